"""Several base models in one search: costs by base, tokens by model, losses that mean the same for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.bases import Base, cost_class, facts_for, labels_of
from budgetsearch.core.errors import SpaceError
from budgetsearch.core.history.history import History
from budgetsearch.core.records import CalibrateJob, Calibration, Segment
from budgetsearch.core.resources.memory import problem
from budgetsearch.core.space.models import with_models
from budgetsearch.core.space.space import Space
from budgetsearch.sampler.sampler import OptunaSampler
from budgetsearch.storage.ledger import read_entries
from tests.support.simulation import SPACE, check_invariants, make_driver
from tests.support.worlds import SyntheticWorld

MODELS = ("small", "large")
TOKENS = {"small": 1.0, "large": 0.8}
"""The same rows are fewer tokens for the larger one."""
WORSE = {"small": 1.0, "large": 0.0}
"""By how much a model ends higher, in nats per byte."""
BUDGET = 3600.0


@dataclass
class TwoModels(SyntheticWorld):
    """The larger model is slower and better; under fp32 it does not fit."""

    gone: tuple[str, ...] = ("large/fp32",)

    def loss(self, segment: Segment, tokens: int) -> float:
        """As of one model, and what it ends higher by."""
        return super().loss(segment, tokens) + WORSE[str(segment.params["model"])]

    def _calibrate(self, job: CalibrateJob) -> Calibration:
        base = Base.parse(job.quantization)
        if job.quantization in self.gone:
            return Calibration(job.quantization, "out_of_memory", detail="it does not fit")
        found = super()._calibrate(replace(job, quantization=base.quantization))
        rate = found.tokens_per_second / (3.0 if base.model == "large" else 1.0)
        return replace(found, quantization=job.quantization, tokens_per_second=rate)


def space() -> Space:
    """That of the other tests, with two models."""
    return with_models(Space.parse(SPACE), MODELS)


def search(path: Path, shares: Mapping[str, float] = TOKENS, budget: float = BUDGET) -> History:
    """A whole run on virtual time, with every invariant checked and every decision taken again."""
    driver = make_driver(
        *(path, TwoModels()),
        budget=budget,
        sampler=OptunaSampler(),
        space=space().to_dict(),
        token_shares=dict(shares),
    )
    driver.quantizations = space().cost_classes
    history = driver.run()
    driver.ledger.close()
    check_invariants(list(read_entries(path)), history, budget)
    return history


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    """An hour's search between the two."""
    return search(tmp_path_factory.mktemp("two") / "ledger.sqlite")


def test_the_better_model_wins_and_the_other_costs_its_share_of_the_early_rungs(history: History) -> None:
    """The slower one is better; the other one never gets a full run."""
    best = history.incumbent
    assert best is not None and history.plan is not None
    assert "large" == best.trial.params["model"]
    tried = Counter(str(state.trial.params["model"]) for state in history.trials.values() if state.started)
    assert min(tried[label] for label in MODELS) >= 2
    full = [history.trials[number].trial.params["model"] for number in history.full_done]
    assert {"large"} == set(full)
    seconds = Counter[str]()
    for segment, result in history.results:
        seconds[str(segment.params["model"])] += result.seconds["train"]
    early = history.plan.ladder[0] * tried["small"] + history.plan.ladder[1]
    assert seconds["small"] <= 1.3 * early
    assert seconds["small"] < seconds["large"]


def test_what_does_not_fit_is_never_tried_and_the_rest_of_its_model_is(history: History) -> None:
    """A pair of model and quantization is left out, not the model and not the quantization."""
    tried = {cost_class(state.trial.params) for state in history.trials.values()}
    assert {"small/fp32", "small/nf4", "large/nf4"} == tried
    assert history.plan is not None
    assert tried == set(history.plan.reference_rates)
    params = {**space().default(), "model": "large", "quantization": "fp32"}
    assert "of no use" in str(problem(history.plan, [], params))


def test_rungs_are_seconds_and_the_data_end_by_each_models_own_tokens(history: History) -> None:
    """The slower one gets fewer tokens in the same time; its data are fewer tokens, too."""
    plan = history.plan
    assert plan is not None
    trials = {cost_class(s.trial.params): s.trial for s in history.trials.values()}
    small, large = trials["small/nf4"], trials["large/nf4"]
    assert small.rung_tokens[0] == pytest.approx(plan.ladder[0] * plan.reference_rates["small/nf4"], rel=0.01)
    assert large.rung_tokens[0] == pytest.approx(small.rung_tokens[0] / 3, rel=0.01)
    assert (plan.max_tokens, int(0.8 * plan.max_tokens)) == (small.max_tokens, large.max_tokens)


def test_a_run_with_one_model_keeps_its_names() -> None:
    """Bases are called by their quantizations alone, as in every ledger before."""
    params = {"quantization": "nf4", "rank": 8, "learning_rate": 1e-3}
    assert ("nf4", ("fp32", "nf4")) == (cost_class(params), Space.parse(SPACE).cost_classes)
    assert ("large/nf4", Base("large", "nf4")) == (
        cost_class({**params, "model": "large"}),
        Base.parse("large/nf4"),
    )
    assert ("small/fp32", "large/fp32", "small/nf4", "large/nf4") == space().cost_classes
    assert "any" == cost_class({"model": "resnet"})  # of a table of recorded curves


@pytest.mark.parametrize(
    "model",
    [{"kind": "float", "low": 0.0, "high": 1.0}, {"kind": "choice", "values": [1, 2]}],
    ids=["range", "choice"],
)
def test_a_model_and_a_slash_of_a_free_space_are_its_own(model: Mapping[str, Any], tmp_path: Path) -> None:
    """A recipe may have a dimension of that name, and quantizations of any; what is of no use goes."""
    own = {"model": model, "quantization": {"kind": "choice", "values": ["int4/g128", "nf4"]}}
    free = {**SPACE, "free": True, "dimensions": {**SPACE["dimensions"], **own}}  # type: ignore[dict-item]
    bases = Space.parse(free).cost_classes
    driver = make_driver(
        *(tmp_path / "ledger.sqlite", SyntheticWorld(broken=["nf4"])), sampler=OptunaSampler(), space=free
    )
    driver.quantizations = bases
    history = driver.run()
    driver.ledger.close()
    check_invariants(list(read_entries(tmp_path / "ledger.sqlite")), history, 720.0)
    assert history.plan is not None
    assert (("int4/g128", "nf4"), {"int4/g128"}) == (bases, set(history.plan.reference_rates))
    started = [state for state in history.trials.values() if state.started]
    assert len(started) > 1
    assert all(isinstance(state.trial.params["model"], (int, float)) for state in started)
    assert problem(history.plan, [], {**started[0].trial.params, "model": 7}) is None


def test_a_space_has_no_models_of_its_own() -> None:
    """They are those of --model: a file that names some would say the same twice."""
    with pytest.raises(SpaceError, match="those of --model"):
        with_models(space(), MODELS)
    own = {"model": {"kind": "constant", "value": "x"}}
    named = Space.parse({**SPACE, "dimensions": {**SPACE["dimensions"], **own}})  # type: ignore[dict-item]
    assert ("model",) == named.extra
    assert () == space().extra


def test_labels_and_facts_tell_models_apart() -> None:
    """The last part of a name, and where that is there twice its place; each model has facts of its own."""
    assert ("Qwen3-8B", "b", "b-3") == labels_of(["Qwen/Qwen3-8B", "/a/b", "/c/b.gguf"])
    assert ("m", "m-3", "m-4") == labels_of(["a/m", "b/m-3", "c/m"])
    facts = {"card": 1, "models": {"a": {"model": 2, "data": 3}, "b": {"model": 4, "data": 5}}}
    assert (4, 1) == (facts_for(facts, {"model": "b"})["model"], facts_for(facts, {"model": "b"})["card"])
    assert 2 == facts_for(facts, None)["model"]
    assert {"model": 7} == facts_for({"model": 7}, {"model": "b"})
