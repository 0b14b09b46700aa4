"""A metric of the user's chooses finalists and checkpoints; the loss ranks the rungs and breaks the ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from budgetsearch.core.decisions import Run
from budgetsearch.core.errors import SettingsError
from budgetsearch.core.events import Decided, Noticed
from budgetsearch.core.history.history import History
from budgetsearch.core.metric import Metric, Values, chosen, read_metric, surpasses
from budgetsearch.core.records import Segment
from budgetsearch.storage.ledger import read_entries
from tests.support.simulation import Killed, Killer, check_invariants, make_driver, run
from tests.support.worlds import SyntheticWorld

GOOD = {4: 0.2, 8: 0.5, 16: 0.9}
"""What the metric gives to a rank, whatever the loss says."""


@dataclass(frozen=True)
class Stand:
    """Something to choose from."""

    loss: float
    merits: Values = ()
    is_final: bool = True


def by_rank(segment: Segment, count: int) -> Sequence[float | None]:
    """A share of the answers is right, and every tenth has no grade."""
    good = GOOD[int(segment.params["rank"])]
    return [None if i % 10 == 9 else float((37 * i) % 100 < 100 * good) for i in range(count)]


def graded(history: History) -> list[tuple[Segment, Values]]:
    """Segments whose answers were graded, and the values."""
    return [(segment, result.metric) for segment, result in history.results if segment.answers]


def best(*ones: Stand) -> Stand | None:
    """As the policy chooses."""
    return chosen(ones, lambda one: (one.loss, 0))


def test_the_metric_chooses_beyond_its_noise_and_ties_are_the_loss() -> None:
    """On the same examples; with fewer than eight that both have nothing is said."""
    low = Stand(1.0, (0.0, 1.0) * 8)
    assert best(low, better := Stand(2.0, (1.0,) * 16)) is better
    assert best(low, Stand(1.1, (1.0, 0.0) * 8)) is low  # as good, on other examples
    assert best(low, Stand(2.0, (1.0,) * 7)) is low
    assert best(low, Stand(2.0, (None,) * 9 + (1.0,) * 7)) is low
    assert best(Stand(0.1, (), is_final=False), low) is low  # an early rung does not compete
    assert best(Stand(0.9), low) == Stand(0.9)  # its measurement failed: the loss decides
    assert best(Stand(0.1, is_final=False), lone := Stand(0.05, is_final=False)) is lone
    assert not surpasses((1.0,) * 16, (1.0,) * 16)
    assert Metric("m:f", "min").merits((1.0, None)) == (-1.0, None)


@pytest.mark.parametrize("budget", [720.0, 20_000.0])
def test_finalists_and_full_run_go_by_the_metric(tmp_path: Path, budget: float) -> None:
    """The best rank by the metric wins, its seconds are charged, and every decision can be replayed."""
    path = tmp_path / "ledger.sqlite"
    world = SyntheticWorld(metric=by_rank, answer_seconds=0.1)
    history = run(path, world, budget=budget, metric=Metric("exact_match"))
    assert history.plan is not None and history.incumbent is not None
    assert 16 == history.incumbent.trial.params["rank"]
    finals = [segment for segment, _ in graded(history) if segment.only_grades]
    assert len(finals) >= 2
    assert {history.plan.top_rung - 1} == {segment.rung for segment in finals}
    assert any(s.rung == history.plan.top_rung for s, _ in graded(history))
    assert sum(0.1 * s.answers for s, _ in graded(history)) <= history.charged["score"]
    by_loss = run(tmp_path / "other.sqlite", SyntheticWorld(), budget=720.0)
    assert by_loss.plan is not None
    assert (0, None) == (by_loss.plan.metric_answers, by_loss.plan.metric)
    decisions = [e.event.decision for e in read_entries(path) if isinstance(e.event, Decided)]
    assert any("exact_match 0." in one.reason for one in decisions if isinstance(one, Run))


def test_a_task_is_asked_as_many_questions_as_it_has(tmp_path: Path) -> None:
    """Its documents, not the validation rows; with too few of them the loss decides alone."""
    for documents, asked in ((0, 200), (1000, 256), (9, 9), (7, 0)):
        world = SyntheticWorld(metric=by_rank, answer_seconds=0.001, documents=documents)
        history = run(tmp_path / f"{documents}.sqlite", world, budget=7200.0, metric=Metric("lm_eval:mine"))
        assert history.plan is not None
        assert asked == history.plan.metric_answers
        assert {asked} == {segment.answers for segment, _ in graded(history)} or not asked


def test_less_is_better_where_that_was_said(tmp_path: Path) -> None:
    """The same values with the other direction: the other rank wins."""
    world = SyntheticWorld(metric=by_rank, answer_seconds=0.1)
    history = run(tmp_path / "ledger.sqlite", world, budget=7200.0, metric=Metric("m:f", "min"))
    ranks = {s.params["rank"] for s, _ in graded(history)}
    assert history.incumbent is not None
    assert len(ranks) > 1
    assert min(ranks) == history.incumbent.trial.params["rank"]


def test_a_run_that_was_killed_while_it_graded_goes_on(tmp_path: Path) -> None:
    """Its finalists are graded again, and the end is that of a run that was never killed."""
    path, budget, metric = tmp_path / "ledger.sqlite", 1200.0, Metric("exact_match")
    world = SyntheticWorld(metric=by_rank, answer_seconds=0.1)
    whole = run(tmp_path / "whole.sqlite", world, budget=budget, metric=metric)
    entries = list(read_entries(tmp_path / "whole.sqlite"))
    begun = next(e.seq for e in entries if "finalist" in str(getattr(e.event, "decision", "")))
    driver = make_driver(path, world, budget=budget, metric=metric)
    driver.ledger.watch(Killer(begun + 1))
    with pytest.raises(Killed):
        driver.run()
    driver.ledger.close()
    driver = make_driver(path, world, budget=budget, metric=metric, clock=driver.clock)  # type: ignore[arg-type]
    history = driver.run()
    driver.ledger.close()
    check_invariants(list(read_entries(path)), history, budget)
    assert whole.incumbent is not None and history.incumbent is not None
    assert whole.incumbent.trial.params == history.incumbent.trial.params


@pytest.mark.parametrize("end", ["crashed", "out_of_memory", "diverged"])
def test_answers_that_cannot_be_had_cost_no_trial(tmp_path: Path, end: str) -> None:
    """Whatever becomes of them, once: then the loss decides."""
    fate = lambda segment: end if segment.only_grades else "ok"  # noqa: E731
    world = SyntheticWorld(metric=by_rank, answer_seconds=0.1, fate=fate)  # type: ignore[arg-type]
    history = run(tmp_path / "ledger.sqlite", world, metric=Metric("exact_match"))
    finals = [s.trial_id for s, _ in graded(history) if s.only_grades]
    assert len(finals) == len(set(finals)) >= 2
    assert not any(history.trials[number].dead for number in finals)
    assert history.full_done


def test_where_answers_take_too_long_the_loss_decides_and_says_so(tmp_path: Path) -> None:
    """No answer is asked for."""
    path = tmp_path / "ledger.sqlite"
    history = run(path, SyntheticWorld(answer_seconds=30.0), metric=Metric("exact_match"))
    assert not graded(history)
    texts = [entry.event.text for entry in read_entries(path) if isinstance(entry.event, Noticed)]
    assert any("The loss decides alone" in text for text in texts)


@pytest.mark.parametrize(
    ("name", "direction", "words"),
    [
        ("lm_eval:", None, "name one task"),
        ("exact_mach", None, "did you mean 'exact_match'"),
        ("my.module:score", None, "--direction max"),
        ("f1", "min", "better the higher"),
        ("loss", "max", "better the lower"),
        ("regex:(", None, "cannot be read"),
        ("regex:", None, "no pattern"),
        ("my module:f", "max", "no such metric"),
    ],
)
def test_what_is_no_metric_is_refused(name: str, direction: str | None, words: str) -> None:
    """In one sentence that says what to write."""
    with pytest.raises(SettingsError, match=words):
        read_metric(name, direction)
