"""Kill runs at hundreds of points and resume them: ``python -m benchmarks.faults.kills --kills 200``.

``--real 25`` are kills of the command line's real training of a tiny model; they take minutes.
"""

from __future__ import annotations

import argparse

from benchmarks.faults.common import record
from tests.support.faults import kills, realkills


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--real", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.kills:
        record("kills", lambda: kills.campaign(given.kills, given.seed).as_json())
    if given.real:
        record("real_kills", lambda: realkills.campaign(given.real, given.seed))


if __name__ == "__main__":
    main()
