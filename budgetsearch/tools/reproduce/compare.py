"""What agrees, within which tolerance, and what differs. Pure: numbers in, rows out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from budgetsearch.core.errors import UsageError

TOLERANCES: Mapping[str, float] = {"fp32": 0.005, "nf4": 0.005, "bf16": 0.02, "int8": 0.02}
"""Of a validation loss, as a share of it, where sums round differently. Source: members of gangs against the
same trials alone (docs/training.md); int8 was not measured and is taken like bf16."""
DECISIVE = ("budgetsearch", "torch", "transformers", "tokenizers", "peft", "bitsandbytes", "reasoning-gym")
"""Packages of another version of which something else may come."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    expected: str
    found: str
    difference: str
    tolerance: str
    agrees: bool | None
    """None: shown, but nothing depends on it."""


def agree(rows: Sequence[Row]) -> bool:
    """Whether no comparison fails."""
    return all(row.agrees is not False for row in rows)


def check_tolerance(given: float | None) -> None:
    """Refuse a tolerance that is no share.

    Raises:
        UsageError: it is negative, no number, or 1 and more.
    """
    if given is not None and not 0 <= given < 1:
        raise UsageError(f"--tolerance must be a share from 0 to 1, such as 0.005; it is {given:g}.")


def tolerance_of(quantization: str, *, exact: bool, given: float | None = None) -> float:
    """What two losses may differ by, as a share: nothing where every sum rounds as it did."""
    if given is not None:
        return given
    return 0.0 if exact else TOLERANCES.get(quantization, max(TOLERANCES.values()))


def loss_row(what: str, expected: float | None, found: float | None, tolerance: float) -> Row | None:
    """Two mean losses; None where one was not measured."""
    if expected is None or found is None:
        return None
    apart = share_apart(expected, found)
    limit = f"{tolerance:.2%}" if tolerance else "equal"
    return Row(what, _number(expected), _number(found), f"{apart:.2g}", limit, apart <= tolerance)


def share_apart(expected: float, found: float) -> float:
    """The difference as a share of what was expected; infinite where one of them is not finite."""
    if expected == found:
        return 0.0
    if not (math.isfinite(expected) and math.isfinite(found)) or expected == 0.0:
        return math.inf
    return abs(found - expected) / abs(expected)


def examples_row(what: str, expected: Sequence[float], found: Sequence[float], *, exact: bool) -> Row | None:
    """Losses example by example; other numbers of them cannot agree. None where none were measured."""
    if not expected:
        return None
    if len(expected) != len(found):
        return Row(what, f"{len(expected)} losses", f"{len(found)} losses", "", "as many", False)
    apart = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    worst = max(range(len(apart)), key=apart.__getitem__)
    equal = tuple(expected) == tuple(found)
    difference = "none" if equal else f"{apart[worst]:.2g} at most, in row {worst}"
    agrees = equal if exact else None if all(map(math.isfinite, found)) else False
    return Row(what, f"{len(expected)} losses", f"{len(found)} losses", difference, _limit(exact), agrees)


def equal_row(what: str, expected: str, found: str) -> Row:
    """Two values that must be equal."""
    same = expected == found
    return Row(what, expected, found, "none" if same else "differs", "equal", same)


def accuracy_row(
    what: str, expected: float | None, found: float | None, answers: int, *, exact: bool
) -> Row | None:
    """Two accuracies. A greedy answer can turn on one rounding, so elsewhere they are only shown."""
    if expected is None or found is None:
        return None
    difference = "none" if expected == found else f"{found - expected:+.1%}"
    agrees = expected == found if exact else None
    name = f"{what} (n = {answers})"
    return Row(name, f"{expected:.1%}", f"{found:.1%}", difference, _limit(exact), agrees)


def changes(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Why sums may round differently here, one sentence each."""
    names = sorted({*expected, *found})
    return [
        f"{name}: {expected.get(name, 'none')} then, {found.get(name, 'none')} now"
        for name in names
        if expected.get(name) != found.get(name)
    ]


def version_changes(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Decisive packages of another version."""
    return changes(
        {name: expected[name] for name in DECISIVE if name in expected},
        {name: found[name] for name in DECISIVE if name in found},
    )


def _number(value: float) -> str:
    return f"{value:.6f}"


def _limit(exact: bool) -> str:
    return "equal" if exact else "shown"
