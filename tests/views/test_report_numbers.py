"""The numbers behind every report, held against computations of their own."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetsearch.core.decisions import Run
from budgetsearch.core.events import (
    Calibrated,
    CardWatched,
    Charged,
    Closed,
    Decided,
    Entry,
    Heartbeat,
    Opened,
    Planned,
    SegmentEnded,
    SegmentStarted,
)
from budgetsearch.core.history.fold import fold
from budgetsearch.core.records import Calibration, Params, Score, TrainJob
from budgetsearch.core.reports import Beat, CardUse
from budgetsearch.core.space.space import Space
from budgetsearch.storage.ledger import MemoryLedger
from budgetsearch.tools.compare.gather import run_of
from budgetsearch.views.intervals import Estimate, bootstrapped, newcombe, weighted_mean, wilson
from budgetsearch.views.report.answer import answer_of, budget_of
from budgetsearch.views.report.html import html_text
from budgetsearch.views.report.markdown import text_of
from budgetsearch.views.report.numbers import (
    ALPHA,
    MIN_IMPORTANCE,
    SCHEMA_VERSION,
    as_json,
    numbers_of,
    pareto,
)
from budgetsearch.views.report.peaks import Peaks, peaks_of
from budgetsearch.views.report.timeline import MemorySample, binned, lanes, timeline_of
from budgetsearch.views.study.importance import importances
from budgetsearch.views.words import rung_ticks
from tests.support.factories import FACTS, SPACE, Story, best_scored, params, plan, whole_run
from tests.support.simulation import make_driver

COSTS = st.integers(1, 6).map(float)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    """The ledger of a whole run on virtual time, with promotions and a full run."""
    path = tmp_path_factory.mktemp("simulated") / "ledger.sqlite"
    driver = make_driver(path, budget=7200.0, max_gang=4, train_tokens=20_000, max_trials=24)
    driver.ledger.close()
    driver.ledger = ledger = MemoryLedger()
    driver.run()
    return ledger.entries


# ------------------------------------------------------------------------- intervals


def test_wilsons_interval_is_that_of_scipy() -> None:
    """At the ends of the scale too."""
    from scipy.stats import binomtest

    for right, count in ((0, 4), (3, 4), (25, 32), (32, 32), (1, 1)):
        found = binomtest(right, count).proportion_ci(0.95, method="wilson")
        ours = wilson(right / count, count)
        assert (ours.value, ours.low, ours.high) == (
            right / count,
            pytest.approx(found.low, abs=1e-9),
            pytest.approx(found.high, abs=1e-9),
        )


def test_newcombes_interval_is_the_published_one() -> None:
    """56 of 70 against 48 of 80: 0.2, from 0.0524 to 0.3339 (Newcombe 1998, table II, method 10)."""
    found = newcombe(wilson(48 / 80, 80), wilson(56 / 70, 70))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_a_bootstrap_is_the_same_at_every_call_and_close_to_the_normal_one() -> None:
    """Of 200 normal values the interval is the mean and 1.96 standard errors, within a tenth of it."""
    rng = random.Random(0)
    values = [rng.gauss(-2.0, 0.5) for _ in range(200)]
    found = bootstrapped(values, [1] * 200)
    assert found == bootstrapped(values, [1] * 200)
    error = math.sqrt(sum((v - found.value) ** 2 for v in values) / 199 / 200)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error * 1.96)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error * 1.96)


def test_long_examples_weigh_more() -> None:
    """The mean is that of the tokens, and so is its interval."""
    values, weights = [1.0] * 10 + [3.0] * 10, [30] * 10 + [10] * 10
    found = bootstrapped(values, weights)
    assert found.value == pytest.approx(1.5)
    assert found.low is not None and found.high is not None
    assert found.low < 1.5 < found.high < 2.0
    assert weighted_mean([1.0, 3.0], [3, 1]) == 1.5


def test_few_or_equal_examples_have_no_interval() -> None:
    """Seven examples say too little; twenty equal ones would have one of no width."""
    assert bootstrapped([1.0, 2.0] * 3 + [1.0], [1] * 7).low is None
    assert bootstrapped([1.5] * 20, [1] * 20) == Estimate(1.5)


# ----------------------------------------------------------------------- the answer


def scored(**changes: object) -> Story:
    """A run whose score knows every example."""
    story = Story.planned()
    story.train(story.trial(), 1.0)
    rng = random.Random(1)
    base = tuple(rng.gauss(3.0, 0.5) for _ in range(24))
    adapter = tuple(loss - rng.gauss(1.0, 0.2) for loss in base)
    tokens = tuple(rng.randint(2, 40) for _ in range(24))
    score = Score(
        "ok", "fp32", weighted_mean(base, tokens), weighted_mean(adapter, tokens), base, adapter, tokens,
        base_accuracy=0.25, adapter_accuracy=0.75, task_examples=32,
        base_grades=(1.0,) * 8 + (0.0,) * 24, adapter_grades=(1.0,) * 24 + (0.0,) * 8,
    )  # fmt: skip
    score = replace(score, **changes)  # type: ignore[arg-type]
    story.add(best_scored(story.history, score), Closed("finished", "over"))
    return story


def test_the_difference_is_paired_by_example() -> None:
    """It is the difference of the two losses, and where examples differ more than what the adapter makes of
    them, its interval is narrower than either's."""
    found = answer_of(scored().history).loss
    assert found is not None
    difference = found.difference_nats_per_token
    both = (found.base_nats_per_token, found.adapter_nats_per_token)
    assert difference.value == pytest.approx(both[1].value - both[0].value)
    assert difference.low is not None and difference.high is not None
    assert difference.low < difference.value < difference.high < 0
    for one in both:
        assert one.low is not None and one.high is not None
        assert one.high - one.low > difference.high - difference.low
    assert (found.examples, found.examples_better) == (24, 24)
    assert "paired" in found.method


def test_accuracies_carry_their_count_and_intervals() -> None:
    """25% and 75% of 32 answers: the difference is 50 points, and its interval excludes none at all."""
    found = answer_of(scored().history).accuracy
    assert found is not None
    assert found.answers == 32
    assert found.base == wilson(0.25, 32)
    assert found.difference.low is not None and found.difference.low > 0


def test_the_budget_tells_wall_seconds_from_charged_ones() -> None:
    """What a run was charged with adds up to its wall time, whether one worker trained or two at once."""
    alone = budget_of(whole_run().history)
    assert alone.charged_seconds == pytest.approx(alone.wall_seconds) == pytest.approx(13.0)
    assert sum(phase.share for phase in alone.phases) == pytest.approx(1.0)
    assert alone.deadline_kept is True
    assert alone.training_share_of_budget == pytest.approx(9.0 / 720.0)
    entries = two_workers()
    found, timeline = budget_of(fold(entries)), timeline_of(entries)
    assert (found.wall_seconds, found.charged_seconds) == (12.0, 12.0)
    assert found.deadline_kept is None, "it has not come to its end"
    assert found.training_share_of_budget == pytest.approx(12.0 / 720.0)
    assert sum(phase.share for phase in found.phases) == pytest.approx(1.0)
    assert (timeline.workers, timeline.phases) == (2, ())
    assert [span.worker for span in timeline.spans] == [0, 1]
    assert [point.charged_seconds for point in timeline.losses] == [12.0, 12.0]


def two_workers() -> list[Entry]:
    """Two jobs at once, each charged with its half of the time."""
    story = Story.planned()
    kept = [entry for entry in story.entries if not isinstance(entry.event, Charged)]
    first = len(story.entries)
    segments = [story.start(story.trial()), story.start(story.trial(params(16)))]
    for segment in segments:
        story.end(segment, 1.0 + segment.trial_id)
    ends = {SegmentEnded: 12.0, Charged: 12.0}
    moved = [
        replace(e, at=ends.get(type(e.event), 2.0), event=Charged("train", 6.0, 0))
        if isinstance(e.event, Charged)
        else replace(e, at=ends.get(type(e.event), 2.0))
        for e in story.entries[first:]
    ]
    return [replace(e, at=0.0) for e in kept] + moved


# ---------------------------------------------------------------------- the timeline


def test_every_segment_is_on_the_timeline_with_its_reason(simulated: list[Entry]) -> None:
    """As many as were started, each from its start to its end and with the reason for it."""
    found = timeline_of(simulated)
    started = {(e.event.job_id, e.event.segment.trial_id): e.at for e in simulated if is_start(e)}
    ended = {(e.event.job_id, e.event.result.trial_id): e.at for e in simulated if is_end(e)}
    reasons = {
        (e.event.decision.job.job_id, segment.trial_id): reason
        for e in simulated
        if isinstance(e.event, Decided) and isinstance(e.event.decision, Run)
        for segment, reason in zip(e.event.decision.job.segments, e.event.decision.reasons, strict=True)
    }
    assert started == {(s.job_id, s.trial_id): s.start_seconds for s in found.spans}
    assert ended == {(s.job_id, s.trial_id): s.stop_seconds for s in found.spans}
    assert reasons == {(s.job_id, s.trial_id): s.reason for s in found.spans}
    assert found.workers == 1
    promoted = {(s.trial_id, s.rung) for s in found.spans if s.promotion}
    history = fold(simulated)
    went_up = {(t.trial_id, rung) for t in history.trials.values() for rung in range(1, t.goal + 1)}
    assert promoted
    assert promoted <= went_up


def is_start(entry: Entry) -> bool:
    """A segment begins."""
    return isinstance(entry.event, SegmentStarted)


def is_end(entry: Entry) -> bool:
    """A segment ends."""
    return isinstance(entry.event, SegmentEnded)


def test_the_phases_tile_the_run(simulated: list[Entry]) -> None:
    """One after the other without a gap, and by phase they add up to what was charged."""
    found, history = timeline_of(simulated), fold(simulated)
    edges = [(p.start_seconds, p.stop_seconds) for p in found.phases]
    assert edges[0][0] == 0.0
    assert all(a[1] == pytest.approx(b[0], abs=1e-3 * history.spent) for a, b in itertools.pairwise(edges))
    assert edges[-1][1] == pytest.approx(sum(history.charged.values()))
    for phase, seconds in history.charged.items():
        drawn = sum(p.stop_seconds - p.start_seconds for p in found.phases if p.phase == phase)
        assert drawn == pytest.approx(seconds, abs=0.01 * history.spent)


def test_the_best_so_far_is_the_lowest_loss_of_a_checkpoint(simulated: list[Entry]) -> None:
    """It never rises, and it ends where the incumbent stands; a loss is known once its job is charged."""
    points, history = timeline_of(simulated).losses, fold(simulated)
    losses = [point.loss_nats_per_token for point in points]
    assert [min(losses[: k + 1]) for k in range(len(losses))] == [p.best_nats_per_token for p in points]
    assert history.incumbent is not None
    assert history.incumbent.best_loss == points[-1].best_nats_per_token
    for point in points:
        assert point.charged_seconds == pytest.approx(point.wall_seconds, abs=1e-6)


@given(st.lists(st.tuples(COSTS, COSTS), max_size=12))
def test_no_two_jobs_share_a_worker_at_once(some: list[tuple[float, float]]) -> None:
    """And there are as many workers as jobs that overlap, no more."""
    jobs = [(k, start, start + length) for k, (start, length) in enumerate(some)]
    found = lanes(jobs)
    for a, begin, end in jobs:
        for b, start, stop in jobs:
            assert a == b or found[a] != found[b] or end <= start or stop <= begin
    most = max((sum(1 for _, s, e in jobs if s <= at < e) for _, at, _ in jobs), default=0)
    assert len(set(found.values())) == most


def test_thousands_of_heartbeats_become_hundreds_and_keep_the_peak() -> None:
    """No more than asked for; the highest memory survives, utilization is averaged over what was measured."""
    samples = [MemorySample(float(k), 100 + k % 7, 0.5 if k % 2 else None) for k in range(5000)]
    samples[1234] = MemorySample(1234.0, 9999, None)
    found, width = binned(samples, 100)
    assert len(found) == 100
    assert width == pytest.approx(49.99)
    assert max(sample.used_bytes for sample in found) == 9999
    assert {sample.utilization for sample in found} == {0.5}
    assert binned(samples[:50], 100) == (tuple(samples[:50]), 0.0)


# ------------------------------------------------------------------------- the whole


@given(st.lists(st.tuples(COSTS, COSTS), min_size=1, max_size=10))
def test_the_front_holds_what_nothing_dominates(some: list[tuple[float, float]]) -> None:
    """Each point outside is beaten or matched by one inside; no point inside beats another."""
    points = [(k, cost, loss) for k, (cost, loss) in enumerate(some)]
    front = pareto(points)
    inside = [(cost, loss) for k, cost, loss in points if k in front]
    assert all(any(c <= cost and x <= loss for c, x in inside) for _, cost, loss in points)
    assert not any(a != b and a[0] <= b[0] and a[1] <= b[1] for a in inside for b in inside)
    assert len(set(inside)) == len(inside)


def test_report_json_holds_the_ledgers_numbers(simulated: list[Entry]) -> None:
    """A round trip loses nothing, and what it says is what the history says."""
    history = fold(simulated)
    numbers = numbers_of(simulated, history, importances)
    found = json.loads(as_json(numbers))
    assert (found["schema"], found["schema_version"]) == ("budgetsearch.report", SCHEMA_VERSION)
    assert found["budget"]["wall_seconds"] == history.spent
    assert {t["trial_id"]: t["best_loss_nats_per_token"] for t in found["trials"]} == {
        number: state.best_loss for number, state in history.trials.items()
    }
    assert len(found["promotions"]) == sum(1 for s in numbers.timeline.spans if s.promotion)
    for one in found["promotions"]:
        below = history.trials[one["trial_id"]].losses
        assert one["loss_before_nats_per_token"] == below[max(k for k in below if k < one["to_rung"])]
    best = history.incumbent
    assert best is not None
    assert found["answer"]["best"]["trial_id"] == best.trial_id
    assert [r["trials_finished"] for r in found["rungs"]] == [
        len(history.at_rung(r["rung"])) for r in found["rungs"]
    ]
    enough = [r["rung"] for r in found["rungs"] if r["trials_finished"] >= MIN_IMPORTANCE]
    assert found["importance"]["rung"] == max(enough)
    assert sum(found["importance"]["shares"].values()) == pytest.approx(1.0)


def test_every_prefix_of_a_ledger_has_numbers(simulated: list[Entry]) -> None:
    """Going, interrupted, before the first trial: always plain JSON without NaN."""
    story = whole_run().entries
    prefixes = [story[:cut] for cut in range(len(story) + 1)]
    prefixes += [simulated[:cut] for cut in range(0, len(simulated), 1 + len(simulated) // 25)]
    for entries in prefixes:
        text = as_json(numbers_of(entries, fold(entries)))
        assert "NaN" not in text
        assert json.loads(text)["schema_version"] == SCHEMA_VERSION


def test_what_is_not_finite_is_null() -> None:
    """JSON has no infinity; a tool that reads the report gets nothing instead."""
    story = Story.planned()
    story.add(Opened(720.0, {"odd": math.inf, "path": Path("a")}, {"card": {"tflops": math.nan}}))
    found = json.loads(as_json(numbers_of(story.entries, story.history)))
    assert found["run"]["settings"] == {"odd": None, "path": "a"}
    assert found["run"]["card"] == {"tflops": None}


def test_what_was_not_measured_is_null() -> None:
    """Without a card there is no utilization and no energy, and no zero in their place."""
    story = whole_run()
    story.add(
        CardWatched(0, CardUse(samples=5, peak_bytes=2**30)), Heartbeat(Beat(0, 0, "train", used_bytes=2**20))
    )
    found = json.loads(as_json(numbers_of(story.entries, story.history)))
    assert found["card"]["peak_bytes"] == 2**30
    assert (found["card"]["utilization"], found["card"]["kilowatt_hours"]) == (None, None)
    assert [s["utilization"] for s in found["timeline"]["memory"]] == [None]
    assert found["limit_bytes"] is None


def test_failures_have_their_causes() -> None:
    """What diverged, what ran out of memory, what never started, and the run itself."""
    story = whole_run()
    story.trial(params(32, 3e-3, "nf4"))
    story.add(Closed("failed", "the disk is full"))
    found = [(f.what, f.status, f.why) for f in numbers_of(story.entries, story.history).failures]
    assert found == [
        ("trial 4, attempt 0", "diverged", "loss is not finite"),
        ("trial 5, attempt 0", "out_of_memory", "too big"),
        ("trial 6", "infeasible", "foreseen not to fit into memory, so it never ran"),
        ("the run", "failed", "the disk is full"),
    ]


def test_the_learning_rate_matters_where_nothing_else_does() -> None:
    """Losses that depend on it alone give it most of the importance; all shares together are 1."""
    rng = random.Random(3)
    space = Space.parse(SPACE)
    results: list[tuple[Params, float]] = []
    for _ in range(60):
        rate = 10 ** rng.uniform(-4, -2)
        configuration = params(rng.choice([4, 8, 16, 32]), rate, rng.choice(["fp32", "nf4"]))
        results.append((configuration, (math.log10(rate) + 3) ** 2))
    found = importances(space, results)
    shares = {name: share for name, (share, _) in found.items()}
    assert next(iter(shares)) == "learning_rate"
    assert shares["learning_rate"] > 0.5
    assert sum(shares.values()) == pytest.approx(1.0)
    assert set(shares) == {"quantization", "rank", "learning_rate", "dropout"}
    assert found["learning_rate"][1] < ALPHA < found["rank"][1]
    assert found == importances(space, results)


def noisy(trials: int, seed: int) -> Story:
    """A run whose losses depend on no parameter."""
    rng, story = random.Random(seed), Story.planned()
    for _ in range(trials):
        configuration = params(rng.choice([4, 8, 16, 32]), 10 ** rng.uniform(-4, -2))
        story.train(story.trial(configuration), 1.0 + rng.random())
    return story


def test_what_noise_gives_is_marked_as_chance() -> None:
    """Some parameter always has the largest share; of ten runs of noise hardly one names one."""
    found = [numbers_of(s.entries, s.history, importances) for s in (noisy(12, seed) for seed in range(10))]
    assert all(max(one.importance.shares.values()) > 0.3 for one in found)
    assert sum(bool(one.importance.above_chance) for one in found) <= 1
    nothing = next(one for one in found if not one.importance.above_chance)
    text = html_text(nothing)
    assert "Too few trials to tell: no parameter stands out" in text
    assert "(chance)" in text and "more than chance gives" in text


def test_too_few_trials_have_no_importance() -> None:
    """Four trials at the fullest rung: the report says so and computes nothing."""
    story = whole_run()
    found = numbers_of(story.entries, story.history, importances).importance
    assert (found.rung, found.trials, dict(found.shares)) == (0, 4, {})
    assert found.method.startswith("too few trials")


def test_rungs_have_short_names_in_plots() -> None:
    """Two short lines for each, numbers alone where there are many, minutes and hours for long times."""
    assert ["rung 0<br>0.4 s", "full run<br>9 s"] == rung_ticks((0.42, 9.0))
    few = ["rung 0<br>44 s", "rung 1<br>7 min", "full run<br>9.6 h"]
    assert few == rung_ticks((44.2, 400.0, 34_560.0))
    many = rung_ticks([4.0 * 3**k for k in range(7)])
    assert ["0<br>4 s", "full<br>49 min"] == [many[0], many[-1]]
    assert all(len(line) <= 6 for tick in many for line in tick.split("<br>"))


def test_a_gang_is_stacked_on_one_worker() -> None:
    """Two trials of one job: members 0 and 1 of 2, on the same worker."""
    story = Story.planned()
    numbers = [story.trial(), story.trial(params(16))]
    alone = [story.start(number) for number in numbers]
    job = TrainJob(7, tuple(alone), 16, 100.0)
    entries = [e for e in story.entries if not isinstance(e.event, SegmentStarted)]
    for event in (Decided(2.0, 1, Run(job, ("a", "b"))), *(SegmentStarted(7, s) for s in alone)):
        entries.append(Entry(len(entries) + 1, 3.0, 0.0, event))
    found = timeline_of(entries)
    assert [(s.trial_id, s.worker, s.member, s.members, s.reason, s.status) for s in found.spans] == [
        (0, 0, 0, 2, "a", "running"),
        (1, 0, 1, 2, "b", "running"),
    ]


@pytest.mark.parametrize(
    ("device", "process", "card"), [("cuda:0", 3 * 2**30, 9 * 2**30), ("cpu", 9 * 2**30, None)]
)
def test_each_peak_has_one_definition_and_one_name(device: str, process: int, card: int | None) -> None:
    """The worker's own counter is the peak of the process, what NVML saw of all processes that of the
    card; on the CPU the watcher looks at the process too. Page, text and comparison agree."""
    facts = {**FACTS, "card": {"name": "some", "device": device}}
    story = Story()
    story.add(Opened(720.0, {"gpu": "some"}, facts))
    calibration = Calibration("fp32", "ok", 100.0, micro_batch=4, peak_bytes=3 * 2**30)
    story.add(Calibrated(calibration), Planned(plan()))
    story.train(story.trial(), 1.5)
    story.add(CardWatched(0, CardUse(samples=5, peak_bytes=9 * 2**30, others_bytes=6 * 2**30)))
    assert Peaks(process, card) == peaks_of(story.history)
    assert process == run_of(story.history, "run", "run").costs.peak_bytes
    text = html_text(numbers_of(story.entries, story.history))
    shown = "there is no card" if card is None else "9.00 GiB"
    assert f"<th>peak of the process</th><td>{process / 2**30:.2f} GiB</td>" in text
    assert f"<th>peak of the card</th><td>{shown}</td>" in text
    lines = text_of(numbers_of(story.entries, story.history)).splitlines()
    assert f"| peak of the process | {process / 2**30:.2f} GiB |" in lines
    assert ("| peak of the card | 9.00 GiB |" in lines) == (card is not None)
    assert not [line for line in (text, *lines) if "peak memory" in line or "most memory in use" in line]
