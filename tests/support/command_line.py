"""The command line, in the tests' own process."""

from __future__ import annotations

from typer.testing import CliRunner

from budgetsearch.cli import app


def invoke(*arguments: str) -> tuple[int, str]:
    """(exit code, everything that was printed)."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output
