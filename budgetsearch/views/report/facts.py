"""Which run a report is about, and how it stands: going, finished, interrupted, failed, or killed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from budgetsearch.core.events import Entry
from budgetsearch.core.history.history import History
from budgetsearch.core.secrets import shown_settings
from budgetsearch.views.card import device_of
from budgetsearch.views.words import STATE_MEANS, Words, state_of, words_of


@dataclass(frozen=True)
class RunFacts:
    """Which run this is, and how it stands."""

    state: str
    """A phase while it goes; else finished, interrupted, failed, or stopped where nobody closed it."""
    going: bool
    """Whether a process works on it."""
    ended: bool
    """Whether the ledger says that it is over; False while it goes, or where its process was killed."""
    reason: str | None
    began: str | None
    """By the clock on the wall, UTC."""
    words: Words
    recipe: Mapping[str, Any]
    """A training of the user's own; nothing where adapters are trained."""
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    card: Mapping[str, Any]
    device: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    """Without passwords."""
    space: Mapping[str, Any]


def facts_of(entries: Sequence[Entry], history: History, going: bool) -> RunFacts:
    """From the ledger; ``going``: a process works on the run, which only the lock in its folder tells."""
    opened = history.opened
    facts = history.facts
    began = datetime.fromtimestamp(entries[0].wall - entries[0].at, UTC) if entries else None
    return RunFacts(
        state=state_of(history, going),
        going=going and history.closed is None,
        ended=history.closed is not None,
        reason=history.closed.reason if history.closed else None,
        began=began.isoformat(timespec="seconds") if began else None,
        words=words_of(history),
        recipe=dict(facts.get("recipe", {})),
        model=dict(facts.get("model", {})),
        data=dict(facts.get("data", {})),
        card=dict(facts.get("card", {})),
        device=device_of(history),
        versions=dict(facts.get("versions", {})),
        settings=shown_settings(opened.settings) if opened else {},
        space=dict(history.plan.space) if history.plan else {},
    )


def state_words(state: str, reason: str | None) -> str:
    """Say how a run stands, in a sentence without its end: ``interrupted: ...``."""
    why = reason or STATE_MEANS.get(state, "it is going")
    return f"{state}: {why}"
