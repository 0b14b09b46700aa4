"""Simulated runs on machines that misbehave: ``python -m benchmarks.faults.slowdowns --runs 1000``."""

from __future__ import annotations

import argparse

from benchmarks.faults.common import record
from tests.support.faults.slowdowns import play_all


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="The first run's seed.")
    given = parser.parse_args()
    record("slowdowns", lambda: play_all(given.runs, given.first))


if __name__ == "__main__":
    main()
