"""A history as text and back, so that a long ledger need not be folded from its beginning by whoever looks.

What can be worked out from the rest is left out.
"""

from __future__ import annotations

import json
import typing
from typing import Any

from budgetsearch.core.codec import decode, read_json
from budgetsearch.core.history.history import History
from budgetsearch.core.history.measured import Measured
from budgetsearch.core.history.retention import regroup

WORKED_OUT = ("active", "retired", "ahead", "measured")
"""Fields of a history that others tell."""


def as_text(history: History) -> str:
    """All that a history holds, as JSON.

    Raises:
        ValueError: a number in it is not finite.
    """
    told = {name: value for name, value in vars(history).items() if name not in WORKED_OUT}
    return json.dumps(told, default=_plain, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return {"is": type(value).__name__, **vars(value)}


def from_text(text: str | bytes) -> History:
    """The history that ``as_text`` told.

    Raises:
        ValueError: it is none, or that of another version.
    """
    told, hints = read_json(text), typing.get_type_hints(History)
    wanted = hints.keys() - set(WORKED_OUT)
    if not isinstance(told, dict) or told.keys() != wanted:
        raise ValueError("it is no history of this version")
    try:
        history = History(**{name: decode(hints[name], value) for name, value in told.items()})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"it is no history: {error}") from error
    if history.plan is not None:
        history.measured = Measured.of(history.plan, history.results)
    regroup(history)
    return history
