"""A full run lands itself by the clock: on virtual time, on machines that are not what was foreseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetsearch.core.landing import Flight, Pilot, fly
from budgetsearch.core.policy.costs import CostModel
from budgetsearch.core.records import Landing, Revision, Schedule, Segment, SegmentResult
from budgetsearch.core.schedule import FALLS, ending_at, full_schedule, rate_factor
from budgetsearch.views.shortfalls import shortfalls
from tests.support.factories import Story, paused

RATE, STEP = 100.0, 500
START, SECONDS, OVERHEAD = 4_000, 400.0, 12.0
PLANNED = START + int(0.97 * (SECONDS - OVERHEAD) * RATE) - int(2.5 * STEP)
"""Where the policy lets the run end at the rate that is foreseen."""


def segment(longest: int = PLANNED, stop: int = PLANNED) -> Segment:
    """The last link of a full run."""
    schedule = Schedule(warmup_tokens=1_000, stop_tokens=PLANNED, cooldown_tokens=PLANNED // 5)
    landing = Landing(SECONDS, RATE, OVERHEAD, 2.0, longest)
    return Segment(
        *(0, {"quantization": "fp32"}, 0, 1, START, stop, schedule),
        batch_size=8,
        micro_batch=8,
        landing=landing,
    )


def landed(pace: Callable[[float], float], longest: int = PLANNED) -> Flight:
    """The flight on a machine on which everything takes ``pace(elapsed)`` times as long."""
    return fly(segment(longest), STEP, lambda tokens, elapsed: pace(elapsed) / RATE)


def possible(pace: Callable[[float], float], at_end: float) -> float:
    """Tokens that the time allows, up to the moment at which the evaluation must begin."""
    tokens, now = float(START), 0.0
    while now < SECONDS - OVERHEAD * at_end:
        tokens, now = tokens + RATE / pace(now), now + 1.0
    return tokens


def last_rate(flight: Flight) -> float:
    """Of learning, at the last step."""
    schedule = flight.revisions[-1].schedule if flight.revisions else segment().schedule
    return rate_factor(schedule, flight.tokens - STEP)


def test_as_foreseen_it_ends_as_planned() -> None:
    """Nothing moves on a machine that keeps its word."""
    flight = landed(lambda at: 1.0)
    assert (flight.tokens, flight.revisions) == (PLANNED, ())


PACES = {
    "slower from the start": lambda at: 2.1,
    "slower from the middle": lambda at: 2.1 if at > 200 else 1.0,
    "slower near the end": lambda at: 2.1 if at > 320 else 1.0,
    "bursts": lambda at: 2.0 if at % 60 < 30 else 1.0,
    "faster": lambda at: 0.5,
    "faster from the middle": lambda at: 0.5 if at > 200 else 1.0,
    "slow, then fast": lambda at: 3.0 if at < 150 else 0.8,
}


@pytest.mark.parametrize("name", PACES)
def test_it_ends_in_time_cooled_down_and_has_used_its_time(name: str) -> None:
    """Whatever becomes of the machine, nearly all the time is trained for, and the evaluation still fits."""
    pace = PACES[name]
    flight = landed(pace, longest=10 * PLANNED)
    at_end = pace(flight.seconds)
    assert flight.seconds + OVERHEAD * max(1.0, at_end) <= SECONDS
    trained, could = flight.tokens - START, possible(pace, max(1.0, at_end)) - START
    assert trained >= 0.88 * could
    assert last_rate(flight) < 0.25


def test_it_goes_no_further_than_it_may() -> None:
    """A faster machine trains on, up to the end of the data or to what another finalist needs."""
    assert landed(lambda at: 0.2, longest=PLANNED + 5_000).tokens == PLANNED + 5_000
    assert landed(lambda at: 0.2).tokens == PLANNED


@given(st.lists(st.tuples(st.floats(1.0, 60.0), st.floats(0.3, 6.0)), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_whatever_the_machine_does_it_is_hardly_late(parts: list[tuple[float, float]]) -> None:
    """It may be late by what the last steps took longer than those before them, and by nothing else; and the
    same revisions give the same rate of learning at every token."""

    def pace(at: float) -> float:
        for length, factor in parts:
            if at < length:
                return factor
            at -= length
        return 1.0

    flight = landed(pace, longest=3 * PLANNED)
    slowest = max(factor for _, factor in parts)
    assert flight.seconds + OVERHEAD <= SECONDS + 3 * STEP * max(1.0, slowest) / RATE
    again = Pilot(replace(segment(), landing=None, revisions=flight.revisions))
    held = {START: segment().schedule} | {r.tokens: r.schedule for r in flight.revisions}
    for tokens in range(START + STEP, flight.tokens + 1, STEP):
        again.look(tokens, 0.0)
        expected = held[max(begin for begin in held if begin <= tokens)]
        assert again.schedule == expected


@given(
    st.integers(1_000, 50_000),
    st.integers(100, 60_000),
    st.integers(1, 80_000),
    st.sampled_from(sorted(FALLS)),
    st.sampled_from([0.1, 0.2, 1.0]),
)
def test_a_moved_end_does_not_make_the_rate_jump(
    stop: int, tokens: int, more: int, shape: str, share: float
) -> None:
    """Wherever the end moves, and however the rate falls."""
    before = Schedule(100, stop, max(1, int(share * stop)), shape, share)
    tokens = min(tokens, stop - 1)
    after = ending_at(before, tokens, tokens + more)
    assert after.stop_tokens == tokens + more
    assert abs(rate_factor(after, tokens) - rate_factor(before, tokens)) < 0.02 + 1.0 / max(1, more) ** 0.5
    assert rate_factor(after, tokens + more) == pytest.approx(0.0, abs=1e-12)


def test_a_configuration_says_how_the_rate_falls_and_over_which_part() -> None:
    """Half of the way through each cooldown, and where it begins; without a word a fifth, as 1 - sqrt."""
    halves = {"sqrt": 1 - 0.5**0.5, "linear": 0.5, "cosine": 0.5}
    for shape, half in halves.items():
        found = ending_at(full_schedule({"schedule": shape, "cooldown": 0.4}, 10, 1000), 500, 1000)
        assert (1.0, pytest.approx(half)) == (rate_factor(found, 600), rate_factor(found, 800))
    assert FALLS["linear"](0.75) > FALLS["cosine"](0.75) > FALLS["sqrt"](0.75)
    usual = ending_at(full_schedule({}, 10, 1000), 500, 1000)
    assert (800, "sqrt") == (usual.stop_tokens - usual.cooldown_tokens, usual.shape)
    late = ending_at(full_schedule({"cooldown": 1.0}, 10, 1000), 500, 1000)
    assert 1.0 == rate_factor(late, 500), "it begins where the trial stands, without a jump"


def test_a_link_that_is_not_the_last_one_stops_and_leaves_the_schedule_alone() -> None:
    """Where the run then ends is planned anew."""
    middle = START + 20_000
    link = segment(stop=middle)
    assert fly(link, STEP, lambda tokens, at: 1 / RATE) == Flight(middle, 200.0, ())
    slow = fly(link, STEP, lambda tokens, at: 4.0 / RATE)
    assert slow.tokens < middle
    assert not slow.revisions
    assert slow.seconds + 4.0 * OVERHEAD <= SECONDS


# ------------------------------------------------------------------- what is made of its end


def full(story: Story, number: int = 1) -> Segment:
    """The last link of a trial's full run has begun."""
    started = story.start(number, 2, "full run starts")
    landed = replace(started, landing=Landing(100.0, RATE, OVERHEAD, 2.0, started.stop_tokens))
    (job_id,) = story.history.running
    story.history.running[job_id] = [landed]
    return landed


def test_an_evaluation_on_fewer_examples_is_compared_on_those() -> None:
    """The first examples are harder than the others here: by themselves they would make it look worse."""
    story = paused()
    before = story.history.trials[1]
    before.best_loss, before.best_examples = 1.0, (2.0, 2.0, 0.0, 0.0)
    story.end(full(story), loss=1.8, example_losses=(1.8, 1.8))
    assert before.best_loss == pytest.approx(0.8)
    assert before.best_tokens == before.tokens


@pytest.mark.parametrize(("fallen", "taken"), [(0.5, True), (0.05, False)])
def test_where_nothing_could_be_measured_the_training_loss_decides(fallen: float, taken: bool) -> None:
    """What a stopped full run trained is exported if its training loss has fallen beyond its noise; then that
    is said, and an evaluation that comes later has the last word."""
    story = paused()
    state = story.history.trials[1]
    state.best_train = 1.0, 0.05
    loss, tokens = state.best_loss, state.best_tokens
    assert loss is not None
    stopped = {"tokens": 6_000, "checkpoint_out": "trial0001-rung2-tokens6000-attempt0"}
    story.end(full(story), status="timeout", train_loss=1.0 - fallen, train_noise=0.05, **stopped)
    assert (state.best_tokens, state.judged) == ((6_000, True) if taken else (tokens, False))
    said = " ".join(str(one) for one in shortfalls(story.history))
    assert ("because the training loss has fallen" in said) == taken
    if taken:
        assert state.best_loss == pytest.approx(loss - fallen)
        again = story.start(1, 2, "its last tokens are evaluated")
        story.end(again, loss=loss + 1.0, **stopped)
        assert (state.best_loss, state.best_tokens, state.judged) == (loss, tokens, False)


@pytest.mark.parametrize(("factor", "known"), [(2.0, 2.0), (0.5, 0.5), (1.1, 1.0)])
def test_what_segments_take_of_late_is_what_the_next_ones_are_expected_to_take(
    factor: float, known: float
) -> None:
    """A machine that has become slower or faster is known by its last segments; noise is not."""
    story = Story.planned()
    plan, history, params = story.history.plan, story.history, segment().params
    assert plan is not None
    rate = plan.reference_rates["fp32"]
    for number in range(12):
        took = 1_000 / rate * (factor if number >= 7 else 1.0)
        result = SegmentResult(0, 0, "ok", START + 1_000, seconds={"train": took})
        history.results.append((segment(stop=START + 1_000), result))
    seconds = CostModel.learn(plan, history).train_seconds(params, 1_000.0)
    assert seconds == pytest.approx(known * 1_000 / rate, rel=0.01)


@pytest.mark.parametrize(
    ("end", "rate", "said"),
    [
        (0.7, 0.5, "training is 2.0 times slower than foreseen"),
        (1.4, 1.5, "training is 1.5 times faster than foreseen"),
        (0.8, 1.5, "there is less time for it than was planned"),
        (1.2, 1.02, "there is more time for it than was planned"),
        (0.95, 0.5, ""),
    ],
)
def test_the_rate_is_blamed_only_for_an_end_that_moved_its_way(end: float, rate: float, said: str) -> None:
    """Else it is the time; of an end that hardly moved nothing is said, and of the same one nothing twice."""
    pilot = Pilot(segment())
    change = Revision(START, Schedule(1_000, int(end * PLANNED), 100), rate)
    found = pilot.news(change, "steps")
    assert said in found
    assert bool(said) == bool(found)
    assert not said or f"now ends at {int(end * PLANNED):,} steps instead of {PLANNED:,}" in found
    assert pilot.news(change, "steps") == ""
