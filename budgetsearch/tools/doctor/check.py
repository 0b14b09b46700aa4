"""One line of an examination, and the rule that no question may end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

from budgetsearch.core.errors import UsageError

T = TypeVar("T")
State = Literal["ok", "warn", "fail"]
SETTLE = "Settle the line `{}` first."
"""The remedy of what another line explains."""
UNEXPECTED = "Reinstall with: pip install --force-reinstall budgetsearch; if this line stays, report it."


@dataclass(frozen=True)
class Check:
    """What was looked at, how it stands, and what to do about it."""

    name: str
    state: State
    text: str
    remedy: str = ""
    """A command or a step; whatever is not ok has one."""

    def __post_init__(self) -> None:
        """A complaint without a way out helps nobody."""
        if (self.state == "ok") == bool(self.remedy):
            raise ValueError(f"{self.name}: {self.state} with the remedy {self.remedy!r}")


def ok(name: str, text: str) -> Check:
    """Nothing to do."""
    return Check(name, "ok", text)


def warn(name: str, text: str, remedy: str) -> Check:
    """A run works, but not as well as it could, or something is not known."""
    return Check(name, "warn", text, remedy)


def fail(name: str, text: str, remedy: str) -> Check:
    """A run would not work."""
    return Check(name, "fail", text, remedy)


def attempt(name: str, question: Callable[[], T]) -> T | Check:
    """What the question finds; an exception, whoever raised it, becomes a failure that names it."""
    try:
        return question()
    except UsageError as error:
        return fail(name, *divided(str(error)))
    except Exception as error:  # a broken installation may raise anything, and that is what is asked about
        return fail(name, f"cannot be checked: {describe(error)}", UNEXPECTED)


def describe(error: BaseException) -> str:
    """An exception on one line: its type, and the first line of its message that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def divided(message: str) -> tuple[str, str]:
    """(what happened, what to do) from a message of ours, where they stand around a semicolon."""
    what, _, todo = message.rpartition("; ")
    return (what, todo[:1].upper() + todo[1:]) if what else (todo, "Correct it, or name another one.")


def line(check: Check) -> str:
    """The check for a terminal or a pipe; its remedy on a second, indented line."""
    text = f"{check.state:<6}{check.name:<15}{check.text}"
    return f"{text}\n{'':<6}{'':<15}-> {check.remedy}" if check.remedy else text


def summary(checks: Sequence[Check]) -> str:
    """The last line: how many of each."""
    states = [check.state for check in checks]
    return f"{states.count('ok')} ok, {states.count('warn')} to note, {states.count('fail')} failed"


def as_values(checks: Sequence[Check]) -> list[dict[str, str]]:
    """The checks as plain JSON values."""
    return [asdict(check) for check in checks]


def exit_code(checks: Sequence[Check]) -> int:
    """1 if anything fails, else 0."""
    return int(any(check.state == "fail" for check in checks))
