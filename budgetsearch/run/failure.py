"""What a failed run tells its user: where it lies, what is safe, and the command that goes on."""

from __future__ import annotations

import math
import shlex
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from budgetsearch.core.errors import LedgerError
from budgetsearch.core.events import Entry
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.policy.answers import MISSING
from budgetsearch.core.policy.decide import IN_VAIN
from budgetsearch.core.secrets import without_secrets
from budgetsearch.run.permissions import flags_again
from budgetsearch.storage.files import append_to, local_time
from budgetsearch.storage.ledger import read_entries
from budgetsearch.storage.runfolder import RunFolder, told_by
from budgetsearch.views.words import counted

MARK = "budgetsearch_run"
"""The attribute of an exception that names the run that it ended."""

MORE_SHARE = 0.1
"""Of its budget, at the least, is proposed for a run that has nothing left."""
MORE_SECONDS = 360.0
SPENT_UP = (
    "      too little budget is left, so the command gives it more in all; budgetsearch report {} tells what "
    "there is"
)


@dataclass(frozen=True)
class Facts:
    """What lies in the folder of a run."""

    path: Path
    adapter: bool
    """Whether there is an adapter that can be used."""
    adapter_trial: int | None = None
    """Whose it is, as it says itself: the ledger may have lost that."""
    last_wall: float = 0.0
    """When the ledger's last event happened, in seconds since the epoch."""
    events: int = 0


def aftermath(facts: Facts, history: History) -> list[str]:
    """Lines for the user of a run that did not come to its end."""
    if history.opened is None:
        return [f"Nothing was earned yet in {facts.path}."]
    spent_up = [SPENT_UP.format(shlex.quote(str(facts.path)))] if _more_time(history) else []
    return [
        f"run   {facts.path}: {history.spent:.0f} of {history.opened.budget_seconds:.0f} s spent",
        f"safe  {_adapter(facts)}; {_trials(history)}",
        f"      the ledger: {facts.events} events until {local_time(facts.last_wall)}",
        *spent_up,
        f"Go on with:  {go_on(facts.path, history)}",
    ]


def go_on(run: Path, history: History) -> str:
    """The command to type next: a run whose budget is spent gets more of it."""
    where = shlex.quote(str(run))
    again = flags_again(history.opened.settings) if history.opened is not None else ""
    if history.closed is not None and history.closed.state == "finished":
        return f"budgetsearch report {where}"
    return f"budgetsearch resume {where}{again}{_more_time(history)}"


def _more_time(history: History) -> str:
    """The option that gives a run more time, where what is left would not even do for its end, or did not do
    for one trial."""
    opened, plan = history.opened, history.plan
    if opened is None:
        return ""
    by_the_wall = bool(opened.settings.get("deadline"))
    now = time.time()
    down = max(0.0, now - history.wall) if by_the_wall else 0.0  # a deadline does not wait
    reserve = plan.reserve_seconds if plan is not None else 0.0
    closed = history.closed
    in_vain = closed is not None and closed.reason.endswith(f"{MISSING}, {IN_VAIN}")
    if not in_vain and opened.budget_seconds - history.spent - down > reserve:
        return ""
    more = max(MORE_SHARE * opened.budget_seconds, 2 * reserve, MORE_SECONDS)
    if by_the_wall:
        return f" --deadline {local_time(now + more)}"
    return f" --hours {math.ceil((history.spent + more) / 36) / 100:.2f}"


def _adapter(facts: Facts) -> str:
    if not facts.adapter:
        return "no adapter yet"
    of = f" of trial {facts.adapter_trial}" if facts.adapter_trial is not None else ""
    return f"the adapter{of} in {facts.path / 'adapter'}"


def _trials(history: History) -> str:
    tried = sum(state.started for state in history.trials.values())
    best = history.incumbent
    if best is None or best.best_loss is None:
        return f"{counted(tried, 'trial')} tried, none with a loss yet"
    return f"{counted(tried, 'trial')} tried, the best loss {best.best_loss:.4f} (trial {best.trial_id})"


def after_failure(run: Path) -> list[str]:
    """The lines for the run in a folder; none where nothing is left of it, or where it cannot be read."""
    folder = RunFolder(run)
    if not folder.has_ledger():
        return []
    try:
        entries: list[Entry] = list(read_entries(folder.ledger))
        history = fold(entries)
    except LedgerError:
        kept = ", the adapter in it can be used" if folder.adapter.is_dir() else ""
        return [f"run   {run}: its ledger cannot be read{kept}"]
    last = entries[-1].wall if entries else 0.0
    whose = told_by(folder.adapter).get("trial_id")
    there = Facts(run, folder.adapter.is_dir(), whose if isinstance(whose, int) else None, last, len(entries))
    return aftermath(there, history)


@contextmanager
def marked(run: Path) -> Iterator[None]:
    """Inside, whatever is raised says which run it ended."""
    try:
        yield
    except BaseException as error:
        error.__dict__[MARK] = run
        raise


def run_of(error: BaseException) -> Path | None:
    """The run that the error ended, if one had begun."""
    found = error.__dict__.get(MARK)
    return found if isinstance(found, Path) and found.is_dir() else None


def keep_traceback(error: BaseException, run: Path) -> Path | None:
    """Add the error with its traceback to a file in the run folder; None if it cannot be written."""
    path = RunFolder(run).traceback
    text = without_secrets("".join(traceback.format_exception(error)))
    try:
        with append_to(path) as file:
            file.write(f"{text}\n".encode("utf-8", "replace"))
    except OSError:
        return None
    return path
