"""A conversation that is too long for one row, as several: what an application would ask with that keeps the
system text and drops the oldest turns.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from budgetsearch.training.data.conversation import Conversation

KEPT = 0.75
"""The share of a row that an answer may take with all before it, so that there is room for the next ones."""
Fits = Callable[[Conversation, float], bool]
"""Whether a conversation is no longer than such a share of a row."""


def windows(talk: Conversation, fits: Fits) -> Iterator[Conversation]:
    """Parts of a conversation that together have each of its answers to learn once.

    The first begins where the conversation does, each further one at a turn of the user, behind the system
    text. Only an answer that is too long with its own question alone makes a part that does not fit.
    """
    left, begin = talk.trained(), _lead(talk)
    while left:
        count = _count(talk, begin, left, fits)
        if not count and (later := _later(talk, begin, left[0], fits)) > begin:
            begin = later
            continue
        yield _part(talk, begin, left[: max(1, count)])
        left = left[max(1, count) :]
        if left:
            begin = _later(talk, begin, left[0], fits)


def _count(talk: Conversation, begin: int, left: list[int], fits: Fits) -> int:
    """How many of these answers fit into a part from ``begin``."""
    return _first(range(len(left)), lambda one: not fits(_part(talk, begin, left[: one + 1]), 1))


def _lead(talk: Conversation) -> int:
    """How many turns are no turns of the talk itself: the system text."""
    roles = (turn.role in ("system", "developer") for turn in talk.turns)
    return next((i for i, is_system in enumerate(roles) if not is_system), 0)


def _part(talk: Conversation, begin: int, learned: list[int]) -> Conversation:
    """The system text and the turns from ``begin`` up to the last of those to learn."""
    kept = [*range(_lead(talk)), *range(begin, learned[-1] + 1)]
    turns = [replace(talk.turns[i], trained=talk.turns[i].trained and i in learned) for i in kept]
    return replace(talk, turns=tuple(turns))


def _later(talk: Conversation, begin: int, answer: int, fits: Fits) -> int:
    """The earliest turn behind ``begin`` that a part with this answer may begin at; the last possible one, if
    none fits; ``begin`` where there is none."""
    asks = [i for i in range(begin + 1, answer) if talk.turns[i].role == "user"]
    fitting = _first(asks, lambda i: fits(_part(talk, i, [answer]), KEPT))
    return asks[min(fitting, len(asks) - 1)] if asks else begin


def _first(items: Sequence[int], holds: Callable[[int], bool]) -> int:
    """The place of the first item for which it holds, if it holds for all behind it; else their number."""
    return bisect.bisect_left(items, True, key=holds)
