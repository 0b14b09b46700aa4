"""A person's hand: first guesses, and wishes while the run goes; each an event, every decision replayable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.decisions import Run
from budgetsearch.core.errors import SpaceError
from budgetsearch.core.events import Asked, Decided, Event, Noticed
from budgetsearch.core.history.history import History
from budgetsearch.core.plan import Plan
from budgetsearch.core.space.space import Space
from budgetsearch.core.wishes import HAND, Wish, as_guess, read_guess
from budgetsearch.run.wishes import Guided, Inbox, events_of
from budgetsearch.storage import inbox
from budgetsearch.storage.ledger import read_entries
from tests.support.simulation import SPACE, RandomSampler, check_invariants, make_driver

SEARCHED = Space.parse(SPACE)
GUESS = "rank=8,learning_rate=3e-3,quantization=nf4"


def steered(path: Path, wish: Callable[[History], Wish | None], **more: Any) -> History:
    """A run in which a person asks once, when ``wish`` says so; its invariants hold."""
    asked: list[Wish] = []

    def wishes(history: History, plan: Plan) -> Iterable[Event]:
        if not asked and (now := wish(history)) is not None:
            asked.append(now)
            yield from events_of(now, history, plan)

    driver = make_driver(path, budget=3600.0, **more)
    driver.wishes = wishes
    history = driver.run()
    driver.ledger.close()
    check_invariants(list(read_entries(path)), history, 3600.0)
    assert asked
    return history


def reasons(path: Path) -> list[str]:
    """Why each segment ran."""
    decisions = [e.event.decision for e in read_entries(path) if isinstance(e.event, Decided)]
    return [reason for one in decisions if isinstance(one, Run) for reason in one.reasons]


def test_a_guess_is_a_configuration_of_the_space() -> None:
    """What it leaves out is the likeliest; what follows from it follows."""
    found = read_guess(GUESS, SEARCHED)
    assert {"rank": 8, "learning_rate": 3e-3, "quantization": "nf4", "alpha": 16, "dropout": 0.0} == found
    assert found == read_guess(as_guess(found, SEARCHED), SEARCHED)
    assert SEARCHED.default() == read_guess("rank=8", SEARCHED) | {"learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rnk=8", "did you mean 'rank'"),
        ("rank=7", "takes 4, 8, 16, not 7"),
        ("rank", "no NAME=VALUE"),
        ("learning_rate=5", "takes 0.0001 to 0.01"),
        ("alpha=3", "tied to rank"),
        (" , ", "is empty"),
    ],
)
def test_what_is_none_is_refused(text: str, words: str) -> None:
    """With what the space has."""
    with pytest.raises(SpaceError, match=words):
        read_guess(text, SEARCHED)


def test_first_guesses_come_first(tmp_path: Path) -> None:
    """Then the sampler, with the numbers that are left."""
    path = tmp_path / "ledger.sqlite"
    driver = make_driver(path, sampler=Guided(RandomSampler(), (GUESS, "rank=16", "rank=99")))
    history = driver.run()
    driver.ledger.close()
    check_invariants(list(read_entries(path)), history, 720.0)
    assert [HAND, HAND, "random"] == [history.trials[n].trial.origin for n in range(3)]
    assert [8, 16] == [history.trials[n].trial.params["rank"] for n in range(2)]


def test_a_configuration_may_be_tried_while_the_run_goes(tmp_path: Path) -> None:
    """It is the next new trial; the same once more is answered with its number."""
    path = tmp_path / "ledger.sqlite"
    ask = Wish("try", guess=GUESS)
    history = steered(path, lambda history: ask if len(history.results) == 3 else None)
    (mine,) = [state for state in history.trials.values() if state.trial.origin == HAND]
    assert mine.rung >= 0
    assert "asked for by hand: new trial" in reasons(path)
    (told,) = events_of(ask, history, history.plan)  # type: ignore[arg-type]
    assert isinstance(told, Noticed) and f"trial {mine.trial_id} has these values" in told.text


def test_a_trial_is_promoted_by_hand(tmp_path: Path) -> None:
    """The worst of those that wait goes on, to the full run where that is next."""

    def last(history: History) -> Wish | None:
        waiting = [s for s in history.active.values() if s.rung == 0 and s.goal == 0 and not s.running]
        worst = max(waiting, key=lambda s: s.losses[0], default=None)
        return Wish("promote", worst.trial_id) if worst is not None and len(waiting) >= 3 else None

    path = tmp_path / "ledger.sqlite"
    history = steered(path, last)
    (asked,) = [e.event for e in read_entries(path) if isinstance(e.event, Asked)]
    assert history.trials[asked.trial_id].goal >= 1
    assert any(reason.startswith("asked for by hand") for reason in reasons(path))


@pytest.mark.parametrize("running", [False, True])
def test_a_trial_is_dropped_by_hand(tmp_path: Path, running: bool) -> None:
    """It never runs again once its segment is over; another one wins, or its adapter stands."""
    marks: list[int] = []

    def one(history: History) -> Wish | None:
        able = [s for s in history.active.values() if s.running == running and s.started]
        if not able or len(history.results) < 2:
            return None
        marks.append(len(history.results))
        return Wish("drop", able[0].trial_id)

    path = tmp_path / "ledger.sqlite"
    history = steered(path, one)
    (asked,) = [e.event for e in read_entries(path) if isinstance(e.event, Asked)]
    after = [s for s, _ in history.results[marks[0] :] if s.trial_id == asked.trial_id]
    assert len(after) == int(running)
    assert "dropped" == history.trials[asked.trial_id].dead
    assert history.full_done and history.incumbent is not None


def test_the_inbox_is_read_once_and_nonsense_is_said(tmp_path: Path) -> None:
    """Files in their order; what is no wish is removed as well."""
    driver = make_driver(None)
    history = driver.run()
    assert history.plan is not None
    inbox.post(tmp_path, Wish("drop", 999))
    (tmp_path / "inbox" / "z.json").write_text("{", encoding="utf-8")
    (tmp_path / "inbox" / "zz.json").symlink_to(tmp_path / "elsewhere")
    texts = [
        event.text for event in Inbox(tmp_path).take(history, history.plan) if isinstance(event, Noticed)
    ]
    assert "no trial 999" in texts[0]
    assert all("was left out" in text for text in texts[1:]) and 3 == len(texts)
    assert not list(Inbox(tmp_path).take(history, history.plan))
