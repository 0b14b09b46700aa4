"""Exit codes, and what an error says before its command exits with one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from budgetsearch.core.errors import BudgetsearchError, UsageError
from budgetsearch.core.secrets import without_secrets
from budgetsearch.views.terminal import echo

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""Ctrl-C."""
EXIT_PREEMPTED = 75
"""SIGTERM or SIGUSR1: EX_TEMPFAIL of sysexits.h, on which schedulers can requeue."""


@contextmanager
def errors() -> Iterator[None]:
    """Every error is one message, and what is safe; wrong input exits with 2, anything else with 1."""
    try:
        yield
    except UsageError as error:
        _fail(error, f"error: {error}", EXIT_USAGE)
    except BudgetsearchError as error:
        _fail(error, f"error: {error}", EXIT_FAILED)
    except KeyboardInterrupt as error:
        _fail(error, "stopped at once", code_of(getattr(error, "signal", "SIGINT")))
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        from budgetsearch.run.failure import keep_traceback, run_of

        run = run_of(error)
        kept = keep_traceback(error, run) if run is not None else None
        if kept is None:
            raise
        what = without_secrets(f"{type(error).__name__}: {error}")
        _fail(error, f"error: {what}. The traceback is in {kept}.", EXIT_FAILED)


def _fail(error: BaseException, message: str, code: int) -> NoReturn:
    from budgetsearch.run.failure import after_failure, run_of

    run = run_of(error)
    for line in (message, *(after_failure(run) if run is not None else ())):
        echo(line, err=True)
    raise typer.Exit(code) from error


def code_of(signal: str) -> int:
    """The exit code of what a signal stopped."""
    return EXIT_INTERRUPTED if signal == "SIGINT" else EXIT_PREEMPTED
