"""Callbacks: what may look on while a run goes.

A callback is a function that takes every event, or an object with a method for each event that it wants:

    class Improvements:
        def on_segment_ended(self, entry, history):
            print(entry.at, entry.event.result.loss, history.incumbent)

``entry`` holds the event, its number and ``at``, the seconds of the run (``budgetsearch.core.events``);
``history`` is the whole run so far, that event included (``budgetsearch.core.history.history``), and is only
to be read. The name of a method is ``on_`` and that of the event in small letters. A callback that raises is
left out from then on, with a warning; the search goes on. What it takes is time of the budget.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from budgetsearch.core.errors import SettingsError, nearest
from budgetsearch.core.events import Entry, Event
from budgetsearch.core.history.history import History
from budgetsearch.core.ports import Watcher

METHODS: Mapping[str, type] = {
    "on" + re.sub(r"(?=[A-Z])", "_", kind.__name__).lower(): kind for kind in get_args(Event)
}
"""The events by the methods that take them."""


def watcher_of(callback: Any) -> Watcher:
    """A watcher that hands events on to a callback.

    Raises:
        SettingsError: it is no function and has no method of an event, or one of no event.
    """
    named = [name for name in dir(callback) if name.startswith("on_")]
    for name in named:
        if name not in METHODS:
            raise SettingsError(f"callbacks: there is no event for {name!r}{nearest(name, METHODS)}.")
    if named:
        return _Methods({METHODS[name]: getattr(callback, name) for name in named})
    if callable(callback):
        return _Everything(callback)
    raise SettingsError(
        f"callbacks: {callback!r} is no function and has no method of an event, such as on_segment_ended."
    )


@dataclass(frozen=True)
class _Methods:
    by_event: Mapping[type, Callable[[Entry, History], Any]]

    def see(self, entry: Entry, history: History) -> None:
        if (method := self.by_event.get(type(entry.event))) is not None:
            method(entry, history)


@dataclass(frozen=True)
class _Everything:
    function: Callable[[Entry, History], Any]

    def see(self, entry: Entry, history: History) -> None:
        self.function(entry, history)
