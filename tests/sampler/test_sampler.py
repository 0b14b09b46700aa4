"""The sampler: pure, spread out at first, then a model of every loss at every rung."""

from __future__ import annotations

import math
import random

import pytest

from budgetsearch.core.events import TrialAdded
from budgetsearch.core.policy.jobs import new_trial
from budgetsearch.core.ports import Proposal
from budgetsearch.core.space.space import Space
from budgetsearch.sampler.cube import from_point, to_row
from budgetsearch.sampler.sampler import BLOCK, OptunaSampler, Points, observations, stratified
from tests.support.factories import SPACE, Story, params

SMALL = {
    "name": "grid",
    "dimensions": {
        "quantization": {"kind": "choice", "values": ["fp32", "nf4"]},
        "rank": {"kind": "choice", "values": [4, 8, 16], "ordered": True},
        "learning_rate": {"kind": "choice", "values": [1e-4, 1e-3], "ordered": True},
    },
}
CONDITIONAL = {
    "name": "conditional",
    "dimensions": {
        **SPACE["dimensions"],
        "noise": {"kind": "float", "low": 1, "high": 9, "when": {"quantization": ["nf4"]}},
    },
}


def bowl(story: Story, count: int) -> None:
    """Run ``count`` startup trials whose loss is lowest at a learning rate of 1e-3."""
    for number in range(count):
        proposal = OptunaSampler().propose(story.history, 0, number, 1)[0]
        story.trial(proposal.params, proposal.origin)
        story.train(number, 1 + abs(math.log10(float(proposal.params["learning_rate"]) / 1e-3)))


def test_the_first_trial_is_the_default_of_the_space() -> None:
    """Trial 0 has every prior at its mode."""
    history = Story.planned().history
    expected = [Proposal(Space.parse(SPACE).default(), "prior")]
    assert expected == OptunaSampler().propose(history, 0, 0, 1)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("block", [0, 1])
def test_a_block_of_startup_trials_covers_quantizations_and_ranks(seed: int, block: int) -> None:
    """Six rows hold every quantization, at least three ranks, and a learning rate from each sixth."""
    space = Space.parse(SPACE)
    rows = [stratified(space, seed, 1 + block * BLOCK + row) for row in range(BLOCK)]
    sixths = sorted(int(space.to_unit(row)["learning_rate"] * BLOCK) for row in rows)
    assert {row["quantization"] for row in rows} == {"fp32", "nf4"}
    assert {row["rank"] for row in rows} == {4, 8, 16, 32}
    assert sixths == list(range(BLOCK))


def test_an_unlikely_value_is_covered_too() -> None:
    """A quantization with a tiny prior still gets one row of six."""
    dimension = {"kind": "choice", "values": ["bf16", "nf4", "int8"], "prior": {"weights": [98, 1, 1]}}
    space = Space.parse({"name": "t", "dimensions": {**SPACE["dimensions"], "quantization": dimension}})
    rows = [stratified(space, 0, 1 + row) for row in range(BLOCK)]
    assert {row["quantization"] for row in rows} == {"bf16", "nf4", "int8"}


def test_origins_follow_the_number_of_the_trial() -> None:
    """Trial 0 is the default, the next eight are stratified; then the model, and now and then the prior."""
    story = Story.planned()
    bowl(story, 30)
    origins = [state.trial.origin for state in story.history.trials.values()]
    assert origins[:9] == ["prior"] + 8 * ["stratified"]
    assert set(origins[9:]) == {"model", "prior"}
    assert 10 <= origins[9:].count("model") <= 20


def test_the_same_arguments_give_the_same_proposals() -> None:
    """A fresh sampler on the same history repeats its answer, whatever other random numbers were drawn."""
    story = Story.planned()
    bowl(story, 12)
    first = OptunaSampler().propose(story.history, 7, 12, 3)
    random.seed(99)
    assert OptunaSampler().propose(story.history, 7, 12, 3) == first
    assert OptunaSampler().propose(story.history, 8, 12, 3) != first


def test_a_sampler_that_remembers_its_fits_proposes_what_a_fresh_one_does() -> None:
    """Fitted parameters are kept between calls; they are those that a resumed run would fit."""
    story = Story.planned()
    kept = OptunaSampler()
    for number in range(24):
        proposal = kept.propose(story.history, 0, number, 1)[0]
        assert OptunaSampler().propose(story.history, 0, number, 1)[0] == proposal
        story.trial(proposal.params, proposal.origin)
        story.train(number, 1 + abs(math.log10(float(proposal.params["learning_rate"]) / 1e-3)))


def test_the_model_goes_where_the_losses_are_low() -> None:
    """After 16 trials with the optimum at 1e-3, most suggestions lie within a factor of three of it."""
    story = Story.planned()
    bowl(story, 16)
    found = OptunaSampler().propose(story.history, 0, 16, 16)
    mine = [p for p in found if p.origin == "model"]
    near = [abs(math.log10(float(p.params["learning_rate"]) / 1e-3)) < 0.5 for p in mine]
    assert len(mine) >= 8
    assert sum(near) >= 0.7 * len(mine)


def test_what_waits_for_its_result_changes_the_next_proposal() -> None:
    """A gang's second configuration takes the first one's expected end for granted; one that died does not
    wait any more."""
    story, dead = Story.planned(), Story.planned()
    for one in (story, dead):
        bowl(one, 16)
    found = {n: OptunaSampler().propose(story.history, 0, n, 1)[0] for n in range(17, 27)}
    numbers = [n for n, proposal in found.items() if proposal.origin == "model"]
    for one in (story, dead):
        one.trial(found[numbers[0]].params)
    dead.end(dead.start(16), status="crashed")
    dead.end(dead.start(16), status="crashed")
    assert dead.history.trials[16].dead == "crashed"
    waiting = [OptunaSampler().propose(story.history, 0, n, 1) for n in numbers]
    gone = [OptunaSampler().propose(dead.history, 0, n, 1) for n in numbers]
    assert sum(a != b for a, b in zip(waiting, gone, strict=True)) >= len(numbers) / 2


def test_nothing_is_proposed_twice_while_the_space_has_something_new() -> None:
    """A grid of twelve is proposed as twelve different configurations; then repetition is allowed."""
    story = Story.planned(space=SMALL)
    for number in range(12):
        proposal = OptunaSampler().propose(story.history, 0, number, 1)[0]
        story.trial(proposal.params, proposal.origin)
        story.train(number, 1.0 + number / 10)
    configurations = {tuple(s.trial.params.items()) for s in story.history.trials.values()}
    assert len(configurations) == 12
    assert len(OptunaSampler().propose(story.history, 0, 12, 1)) == 1


def test_one_call_for_many_does_not_repeat_itself() -> None:
    """Proposals of one call differ from each other as well."""
    history = Story.planned(space=SMALL).history
    found = OptunaSampler().propose(history, 0, 0, 12)
    assert len({tuple(p.params.items()) for p in found}) == 12


def test_every_loss_counts_at_its_length_and_what_failed_as_the_worst() -> None:
    """Two rungs of one trial are two observations; diverged and infeasible are as bad as the worst."""
    story = Story.planned()
    bowl(story, 6)
    story.train(0, 0.5, 1)
    story.end(story.start(story.trial(params(4, 5e-3))), status="diverged")
    story.end(story.start(story.trial(params(32, 2e-3))), status="out_of_memory")
    story.end(story.start(story.trial(params(8, 2e-3)), micro_batch=2), status="out_of_memory")
    shrunk = story.start(story.trial(params(16, 2e-3)), micro_batch=4)
    story.end(shrunk, status="out_of_memory", micro_batch=1)
    seen = observations(story.history, Points(Space.parse(SPACE)))
    assert len(seen.y) == 10  # all but the one that is tried again with a smaller micro-batch
    assert seen.y[6] == 0.5
    assert seen.s[6] > seen.s[0]
    assert seen.x[6].tolist() == seen.x[0].tolist()
    assert seen.y[7] == seen.y[8] == seen.y[9] == max(seen.y)


@pytest.mark.filterwarnings("error")
def test_conditional_dimensions_are_searched() -> None:
    """A dimension that counts only under nf4 is present there, absent elsewhere, and the model copes."""
    story = Story.planned(space=CONDITIONAL)
    bowl(story, 14)
    for proposal in OptunaSampler().propose(story.history, 0, 14, 6):
        assert ("noise" in proposal.params) == (proposal.params["quantization"] == "nf4")
        assert proposal.origin in ("model", "prior")


def test_configurations_survive_the_way_to_the_cube_and_back() -> None:
    """A configuration and its point in the model's cube belong together."""
    space = Space.parse(SPACE)
    for number in range(1, 7):
        before = stratified(space, 3, number)
        after = from_point(space, to_row(space, before))
        assert before["learning_rate"] == pytest.approx(after["learning_rate"])
        assert {**before, "learning_rate": 0} == {**after, "learning_rate": 0}


def slow_learners(story: Story, count: int, *, agree: bool) -> list[Proposal]:
    """The sampler's trials, of which the best fifth is promoted: high rates win the first rung, and the ends
    too if the rungs ``agree``; else low ones do. Returns the proposals."""
    plan, found = story.history.plan, []
    assert plan is not None
    for number in range(count):
        (proposal,) = OptunaSampler().propose(story.history, 0, number, 1)
        found.append(proposal)
        story.add(TrialAdded(new_trial(plan, number, proposal)))
        rate = Space.parse(SPACE).to_unit(proposal.params)["learning_rate"]
        losses = [1 - rate, 0.9 - rate, 0.8 - rate] if agree else [1 - rate, 0.5, rate]
        entry = story.history.trials[number].trial.entry
        story.train(number, losses[entry], entry)
        for rung in range(entry, 2):
            if story.history.place(story.history.trials[number], rung) * plan.eta > len(
                story.history.ranks[rung]
            ):
                break
            story.train(number, losses[rung + 1], rung + 1)
    return found


def test_slow_learners_leave_out_the_rungs_that_would_not_promote_them() -> None:
    """Where the first rung says the opposite of the end, what is expected to end best begins above it, so
    that the model learns there; where rungs agree everybody begins below."""
    ladder = (3.0, 10.0, 30.0, 90.0)
    story = Story.planned(ladder=ladder, max_tokens=10**9, scouts=1)
    misled = slow_learners(story, 60, agree=False)
    above = [one for one in misled if one.entry > 0]
    assert len(above) >= 5
    space = Space.parse(SPACE)
    assert all(space.to_unit(one.params)["learning_rate"] < 0.7 for one in above)
    assert all(one.origin == "model" for one in above)
    assert all(one.entry == 0 for one in misled[:15]), "fifteen must be known of the rung"
    agreed = slow_learners(Story.planned(ladder=ladder, max_tokens=10**9, scouts=1), 60, agree=True)
    assert sum(one.entry > 0 for one in agreed) <= 2
    hasty = slow_learners(Story.planned(ladder=ladder, max_tokens=10**9), 30, agree=False)
    assert all(one.entry == 0 for one in hasty), "a budget without scouts has no time for it"
