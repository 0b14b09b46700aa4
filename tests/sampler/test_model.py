"""The Gaussian process over configuration and length of training, and the Optuna sampler made of it."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest

from budgetsearch.core.policy.evidence import MIN_AGREEMENT, agreement, rank_correlation
from budgetsearch.sampler import surrogate
from budgetsearch.sampler.cube import Cube, parameters, suggest
from budgetsearch.sampler.optuna import FidelityGPSampler
from budgetsearch.sampler.surrogate import Observations, Surrogate, expected_improvement, fidelity, fit

optuna.logging.set_verbosity(optuna.logging.ERROR)


def observed(count: int = 60, seed: int = 0) -> Observations:
    """A bowl around (0.3, 0.7) that becomes deeper with training; the third dimension does nothing."""
    rng = np.random.default_rng(seed)
    x, s = rng.random((count, 3)), rng.choice([0.2, 0.5, 1.0], size=count)
    y = ((x[:, 0] - 0.3) ** 2 + (x[:, 1] - 0.7) ** 2) * 4 - 1.5 * s
    return Observations(x, s, y)


def test_the_gradient_of_the_fit_is_that_of_its_value() -> None:
    """Each component agrees with a central difference."""
    seen = observed(25)
    center, spread = surrogate._prior(3)
    at = center + 0.3 * np.random.default_rng(1).standard_normal(len(center))
    z = surrogate.normal_scores(seen.y)
    _, gradient = surrogate._loss(at, seen.x, seen.s, z, center, spread)
    for k in range(len(at)):
        step = np.zeros(len(at))
        step[k] = 1e-5
        up, _ = surrogate._loss(at + step, seen.x, seen.s, z, center, spread)
        down, _ = surrogate._loss(at - step, seen.x, seen.s, z, center, spread)
        assert gradient[k] == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-4)


def test_what_does_nothing_is_found_out() -> None:
    """The idle dimension gets the longest lengthscale of the three."""
    fitted = np.exp(fit(observed(80)))
    assert fitted[2] > 1.5 * max(fitted[0], fitted[1])


def test_predictions_rank_points_that_were_not_seen() -> None:
    """The rank correlation with the truth at the full length is high, and doubt grows away from data."""
    seen = observed(80)
    model = Surrogate(seen, fit(seen))
    x = np.random.default_rng(9).random((200, 3))
    mean, deviation = model.predict(x)
    truth = (x[:, 0] - 0.3) ** 2 + (x[:, 1] - 0.7) ** 2
    assert rank_correlation(list(mean), list(truth)) > 0.95
    _, at_data = model.predict(seen.x[seen.s == 1.0])
    assert at_data.mean() < deviation.mean()


def test_the_best_suggestion_lies_in_the_bowl() -> None:
    """Expected improvement leads to (0.3, 0.7), also past a category that has a better value."""
    seen = observed(80)
    kinds = np.random.default_rng(3).integers(2, size=80)
    cube = Cube((None, None, None, 2))
    mixed = Observations(np.column_stack([seen.x, kinds]), seen.s, seen.y + 1.0 * kinds)
    best = suggest(cube, mixed, parameters(cube, mixed), np.random.default_rng(0)).points[0]
    assert np.hypot(best[0] - 0.3, best[1] - 0.7) < 0.2
    assert best[3] == 0


def test_expected_improvement_of_a_sure_thing_is_what_it_improves() -> None:
    """Without doubt it is the difference, or nothing."""
    gain = expected_improvement(np.array([1.0, 3.0]), np.array([1e-9, 1e-9]), 2.0)
    assert gain == pytest.approx([1.0, 0.0])


def test_fidelity_is_one_at_the_full_length_and_never_negative() -> None:
    """It falls with the logarithm of the share."""
    assert fidelity(1.0) == 1.0
    assert fidelity(1 / 50) == pytest.approx(0.0)
    assert fidelity(1e-9) == 0.0
    assert fidelity(1 / 3) > fidelity(1 / 9) > fidelity(1 / 27)


def test_ties_share_a_rank_and_one_outlier_changes_nothing() -> None:
    """Normal scores depend on the order alone."""
    plain = surrogate.normal_scores(np.array([1.0, 2.0, 2.0, 3.0]))
    assert plain[1] == plain[2] == pytest.approx(0.0)
    assert surrogate.normal_scores(np.array([1.0, 2.0, 2.0, 1e9])).tolist() == plain.tolist()


def test_the_optuna_sampler_beats_chance_in_a_pruned_study() -> None:
    """In a study with pruning, a log scale, whole numbers and categories, it ends lower than random."""

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)
        width = trial.suggest_int("width", 8, 128, step=8)
        kind = trial.suggest_categorical("kind", ["a", "b", "c"])
        floor = (math.log10(rate) + 3) ** 2 + ((width - 64) / 64) ** 2 + {"a": 0.0, "b": 0.3, "c": 0.6}[kind]
        for step in (1, 3, 9):
            trial.report(floor + 2 / step, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return floor + 2 / 9

    def best(sampler: optuna.samplers.BaseSampler) -> float:
        pruner = optuna.pruners.SuccessiveHalvingPruner()
        study = optuna.create_study(sampler=sampler, pruner=pruner)
        study.optimize(objective, n_trials=30)
        return study.best_value

    ours = [best(FidelityGPSampler(max_resource=9, seed=seed)) for seed in range(4)]
    chance = [best(optuna.samplers.RandomSampler(seed=seed)) for seed in range(4)]
    assert sum(ours) < sum(chance)
    assert min(ours) < 2 / 9 + 0.1


def test_the_optuna_sampler_maximises_too_and_refuses_two_objectives() -> None:
    """Of a study to maximise it takes the negative; several objectives are an error."""
    study = optuna.create_study(direction="maximize", sampler=FidelityGPSampler(seed=0))
    study.optimize(lambda trial: -((trial.suggest_float("x", 0, 1) - 0.8) ** 2), n_trials=25)
    assert abs(study.best_params["x"] - 0.8) < 0.05
    two = optuna.create_study(directions=["minimize", "minimize"], sampler=FidelityGPSampler(seed=0))
    with pytest.raises(ValueError, match="one objective"):
        two.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1.0), n_trials=2)


# --------------------------------------------------------------------- the evidence


def test_rungs_that_agree_and_rungs_that_do_not() -> None:
    """The same order at the top agrees; a reversed one does not; no spread speaks against nothing."""
    losses = [1.0, 1.1, 1.3, 1.7, 2.0, 3.0, 5.0, 9.0]
    assert agreement(losses, [x / 2 for x in losses]) == pytest.approx(1.0)
    assert agreement(losses, losses[::-1]) < 0
    assert agreement(losses, [1.0] * 8) == 1.0
    swapped = [1.3, 1.7, 1.0, 1.1, *losses[4:]]
    assert agreement(losses, swapped) < MIN_AGREEMENT < rank_correlation(losses, swapped) + 0.1


def test_a_diverged_trial_counts_as_the_worst_finite_one() -> None:
    """An infinite loss does not drown the others."""
    assert agreement([1.0, 2.0, 3.0, math.inf], [1.0, 2.0, 3.0, math.inf]) == pytest.approx(1.0)
    assert agreement([1.0, 2.0, 3.0, math.inf], [3.0, 2.0, 1.0, math.inf]) < MIN_AGREEMENT


def test_rank_correlation_is_spearmans() -> None:
    """By hand: one swap of neighbours among five is 0.9; ties share their mean rank."""
    assert rank_correlation([1, 2, 3, 4, 5], [1, 2, 3, 5, 4]) == pytest.approx(0.9)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 2, 2], [1, 1, 2, 2]) == pytest.approx(1.0)


def test_what_waits_for_its_result_is_not_suggested_again() -> None:
    """The expected end of a waiting point is believed: the model is surer there, its mean hardly moves, and
    a gang's suggestions lie further apart where it matters than without."""
    cube, seen = Cube((None, None, None)), observed(12)
    fitted = parameters(cube, seen)
    first = suggest(cube, seen, fitted, np.random.default_rng(1)).points[0]
    model = Surrogate(seen, fitted)
    believer = model.believing(first[None, :])
    (before, doubt), (after, less) = model.predict(first[None, :]), believer.predict(first[None, :])
    assert after == pytest.approx(before, abs=0.05)
    assert less < 0.8 * doubt
    apart, close = [], []
    for number in range(6):
        waiting = np.array(apart).reshape(-1, 3)
        apart.append(suggest(cube, seen, fitted, np.random.default_rng(number), waiting).points[0])
        close.append(suggest(cube, seen, fitted, np.random.default_rng(number)).points[0])
    matter = slice(0, 2)
    assert np.std(apart, axis=0)[matter].mean() > 1.5 * np.std(close, axis=0)[matter].mean()
