"""Real runs of 45 to 180 s under load: ``python -m benchmarks.faults.deadlines --runs 30`` takes an hour."""

from __future__ import annotations

import argparse

from benchmarks.faults.common import record
from tests.support.faults.deadlines import LOAD, budgets_of, campaign


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--load", type=int, default=LOAD, help="Processes that compete for the processor.")
    given = parser.parse_args()
    record("deadlines", lambda: campaign(budgets_of(given.runs), given.load))


if __name__ == "__main__":
    main()
