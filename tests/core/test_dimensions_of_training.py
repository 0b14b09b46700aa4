"""Settings of training as dimensions: what a trial makes of them, what they cost, a run over all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import SpaceError
from budgetsearch.core.footprint import Footprint
from budgetsearch.core.history.measured import cost_keys
from budgetsearch.core.plan import Trial
from budgetsearch.core.policy.jobs import new_trial
from budgetsearch.core.ports import Proposal
from budgetsearch.core.resources.memory import CAUTION, micro_batch, needs_as_much
from budgetsearch.core.space.knobs import KNOBS, SETTINGS
from budgetsearch.core.space.space import Space
from budgetsearch.run.preflight import _space
from budgetsearch.run.spaces import load_space
from budgetsearch.tools.plan.rehearsal import PriorSampler
from tests.support.factories import params, plan
from tests.support.simulation import SPACE, run
from tests.support.worlds import SyntheticWorld

WIDE = load_space("lora_wide")
RULE = Footprint(fixed=1000.0, per_rank=10.0, per_token=2.0, per_token_recompute=1.0)


def trial(**more: Any) -> Trial:
    """A trial with these settings of its own, on a plan with batches of 8 and steps of 80 tokens."""
    return new_trial(plan(epoch_tokens=2000), 0, Proposal({**params(), **more}, "prior"))


def test_a_trial_has_its_own_batch_warmup_and_length() -> None:
    """Without them it has the plan's."""
    usual = trial()
    assert (8, 333, 100_000) == (usual.batch_size, usual.warmup_tokens, usual.max_tokens)
    assert 4 * 40 == trial(batch_size=4, warmup_steps=4).warmup_tokens
    small = trial(batch_size=2)
    assert (2, 2) == (small.batch_size, small.micro_batch)
    assert 5000 == trial(epochs=2.5).max_tokens
    assert max(trial(epochs=1).rung_tokens) == 2000
    assert 100_000 == trial(epochs=1000).max_tokens


def test_shorter_rows_are_fewer_tokens_and_more_of_them_fit() -> None:
    """Steps, epochs and the end of the data shrink by what is cut off; between known lengths evenly."""
    some = plan(epoch_tokens=2000, length_shares=((64, 0.5), (256, 1.0)))

    def cut(length: int, **more: Any) -> Trial:
        return new_trial(some, 0, Proposal({**params(), "max_length": length, **more}, "prior"))

    assert (50_000, 75_000, 100_000) == tuple(cut(length).max_tokens for length in (64, 160, 512))
    assert (0.25, 1.0) == (some.length_share({"max_length": 32}), some.length_share({}))
    assert 1000 == cut(64, epochs=1).max_tokens
    assert 4 * 40 == cut(64, warmup_steps=4).warmup_tokens
    assert needs_as_much({**params(), "max_length": 256}, {**params(), "max_length": 64})
    assert not needs_as_much({**params(), "max_length": 64}, {**params(), "max_length": 256})
    assert not needs_as_much({**params(), "max_length": 64}, params())
    limit = int(RULE.bytes(rank=8, tokens=4 * 256, recompute=False) / CAUTION) + 1
    tight = replace(
        some, footprints={"fp32": RULE}, limit_bytes=limit, longest=256, micro_batches={"fp32": 4}
    )
    assert (4, 8) == tuple(micro_batch(tight, {**params(), "max_length": length}) for length in (256, 128))


def test_the_names_of_a_free_space_mean_nothing_here() -> None:
    """A recipe's own ``batch_size`` or ``epochs`` is no business of the policy: its rungs stay the plan's."""
    free = plan(space={**SPACE, "free": True}, epoch_tokens=2000)
    odd = {**params(), "batch_size": "wide", "epochs": 1, "warmup_steps": 4000}
    mine, usual = (new_trial(free, 0, Proposal(some, "prior")) for some in (odd, params()))
    assert (mine.rung_tokens, mine.batch_size, mine.micro_batch, mine.warmup_tokens, mine.max_tokens) == (
        *(usual.rung_tokens, usual.batch_size, usual.micro_batch, usual.warmup_tokens, usual.max_tokens),
    )


def test_what_changes_the_cost_of_a_token_is_learnt_apart() -> None:
    """The rank alone as ever, where a space has nothing else."""
    assert (("fp32", None), ("fp32", 8)) == cost_keys(params())
    kinds = [cost_keys({**params(), **more})[1] for more in ({"batch_size": 4}, {"batch_size": 8}, {})]
    assert 3 == len(set(kinds))
    assert cost_keys(params()) == cost_keys({**params(), "weight_decay": 0.1})


def test_the_wide_space_holds_what_training_knows() -> None:
    """Each with its source; nothing is left out but the layers, which are the model's, and the length of the
    rows, which is the data's."""
    assert WIDE.extra == ()
    assert {*KNOBS, *SETTINGS} - WIDE.named == {"targets", "max_length"}
    assert all(dimension.source for dimension in WIDE.dimensions)
    assert (32, 4) == (WIDE.largest("batch_size", 8), WIDE.largest("epochs", 1))
    assert 8 == load_space("lora").largest("batch_size", 8)


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("weight_dekay", {"kind": "constant", "value": 0.1}, "weight_decay"),
        ("batch_size", {"kind": "constant", "value": 0.5}, "whole number"),
        ("rslora", {"kind": "choice", "values": [0, 1]}, "true or false"),
        ("schedule", {"kind": "choice", "values": ["linear", "polynomial"]}, "sqrt, linear, cosine"),
        ("cooldown", {"kind": "float", "low": 0.5, "high": 2.0}, "above 0, at most 1"),
        ("max_length", {"kind": "constant", "value": 4}, "at least 8, in tokens"),
        ("batch", {"kind": "constant", "value": 8}, "did you mean 'batch_size'"),
    ],
)
def test_what_training_does_not_know_is_refused(name: str, body: dict[str, Any], words: str) -> None:
    """With the nearest name, or with what the setting takes."""
    dimensions: dict[str, Any] = {**SPACE["dimensions"], name: body}  # type: ignore[dict-item]
    with pytest.raises(SpaceError, match=words):
        checked({"dimensions": dimensions})


def checked(raw: dict[str, Any]) -> None:
    """As a run looks at its space."""
    _space(None, Space.parse(raw, "mine"))  # type: ignore[arg-type]


def test_a_run_over_all_of_them_keeps_its_promises(tmp_path: Path) -> None:
    """Deadline, charges and replay, in gangs too; its trials differ in their batches."""
    raw = WIDE.to_dict()
    raw["dimensions"][0]["values"] = ["fp32", "nf4"]
    changes: dict[str, Any] = {"space": raw, "batch_size": 32, "sampler": PriorSampler(), "max_gang": 4}
    world = SyntheticWorld(gains={2: 1.8, 4: 3.0})
    history = run(tmp_path / "ledger.sqlite", world, budget=7200.0, **changes)
    ends = [(s.params, s.schedule) for s, _ in history.results if s.schedule.cooldown_tokens]
    assert ends
    assert all((p["schedule"], p["cooldown"]) == (one.shape, one.share) for p, one in ends)
    batches = {state.trial.batch_size for state in history.trials.values() if state.started}
    assert {8, 16, 32} == batches
    assert any(size > 1 for size in [result.gang for _, result in history.results])
