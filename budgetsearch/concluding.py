"""What follows a search: manifest and reports. Whatever happens to them, what was earned stands."""

from __future__ import annotations

from budgetsearch.aftermath import keep_traceback
from budgetsearch.clock import Timing
from budgetsearch.core.history import fold
from budgetsearch.core.ports import Say
from budgetsearch.core.secrets import without_secrets
from budgetsearch.ledger import read_entries
from budgetsearch.reporting import write_in_time
from budgetsearch.runfolder import RunFolder

AMPLE_SECONDS = 600.0
"""For the reports of a run that was over before this process began."""


def conclude(folder: RunFolder, say: Say, timing: Timing | None = None) -> None:
    """Write manifest and reports within what is left of the time; what cannot be written is said.

    A signal ends it: the run is over, and reports can be written at any time.
    """
    try:
        _write(folder, say, timing)
    except KeyboardInterrupt:
        say(f"stopped before the reports were written; {_later(folder)}")
    except OSError as error:
        say(f"the reports cannot be written ({error}); make room, then: {_command(folder)}")
    except Exception as error:
        kept = keep_traceback(error, folder.path)
        where = f" (the traceback is in {kept})" if kept else ""
        what = without_secrets(f"{type(error).__name__}: {error}")
        say(f"the reports could not be written: {what}{where}; {_later(folder)}")


def _write(folder: RunFolder, say: Say, timing: Timing | None) -> None:
    from budgetsearch.reproduction.manifest import write_manifest

    entries = list(read_entries(folder.ledger))
    history = fold(entries)
    write_manifest(folder, history)
    left = timing.budget_seconds - timing.clock.now() if timing else AMPLE_SECONDS
    if untold := write_in_time(folder, entries, history, left):
        say(untold)


def _command(folder: RunFolder) -> str:
    return f"budgetsearch report {folder.command_word}"


def _later(folder: RunFolder) -> str:
    return f"`{_command(folder)}` writes them"
