"""How much each parameter mattered for being among the best, and whether that is more than chance gives."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from budgetsearch.core.records import Params
from budgetsearch.core.space.space import Space
from budgetsearch.views.intervals import holm
from budgetsearch.views.study.distributions import quiet, shown

GOOD_TRIALS = 5
"""So many trials count as the best, at the least: its documentation asks for them, to be steady."""
GOOD_SHARE = 0.1
"""... or this share of them, where that is more."""
PERMUTATIONS = 199
"""Shuffles of the losses. A p-value of one parameter can be 1 in 200, so that six of them together can still
stand out after Holm's correction; each shuffle takes about 4 ms."""
SEED = 0


def importances(space: Space, results: Sequence[tuple[Params, float]]) -> dict[str, tuple[float, float]]:
    """Each searched parameter's share and its p-value, the largest share first; the shares add up to 1.

    PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255): how far the best trials' values of a parameter lie
    from those of all trials. ``results`` are configurations with their losses, all at the same rung. Some
    distance there always is, and few trials make it large: the p-value says how often shuffled losses, which
    depend on no parameter, give one as large or larger (a permutation test; Holm's correction for the number
    of parameters). It compares distances, for a share also depends on those of the others.
    """
    losses = [loss for _, loss in results]
    with _study(space, results) as study:
        found = _distances(study, losses)
        exceeded = dict.fromkeys(found, 0)
        rng = random.Random(SEED)
        for _ in range(PERMUTATIONS):
            shuffled = _distances(study, rng.sample(losses, len(losses)))
            for name in exceeded:
                exceeded[name] += shuffled[name] >= found[name]
    corrected = holm([(1 + count) / (1 + PERMUTATIONS) for count in exceeded.values()])
    p_values = dict(zip(exceeded, corrected, strict=True))
    whole = sum(found.values())
    order = sorted(found, key=lambda name: (-found[name], name))
    return {name: (found[name] / whole if whole else 1 / len(found), p_values[name]) for name in order}


@contextmanager
def _study(space: Space, results: Sequence[tuple[Params, float]]) -> Iterator[Any]:
    """The configurations as Optuna's trials, numbered in their order."""
    import optuna

    with quiet(), warnings.catch_warnings():
        # Optuna reminds of the direction wherever a target is given; here low is good.
        warnings.filterwarnings("ignore", message=".*computes the importances of params to achieve low")
        study = optuna.create_study(direction="minimize")
        for params, loss in results:
            distributions = shown(space, params)
            known = {name: params[name] for name in distributions}
            study.add_trial(optuna.trial.create_trial(params=known, distributions=distributions, value=loss))
        yield study


def _distances(study: Any, losses: Sequence[float]) -> dict[str, float]:
    """Measure how far apart the best and all lie in each parameter, if these were the trials' losses."""
    import optuna

    good = max(GOOD_SHARE, min(1.0, GOOD_TRIALS / len(losses)))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=good)
    found = optuna.importance.get_param_importances(
        study, evaluator=evaluator, target=lambda trial: losses[trial.number], normalize=False
    )
    return {name: float(distance) for name, distance in found.items()}
