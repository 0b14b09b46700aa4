"""The fleet's process: ``python -m budgetsearch.engines.ray.fleet``, JSON lines on its pipes.

It owns Ray beside the driver. So Ray's signal handlers, its threads and the ways in which it ends a process
stay away from the driver: whatever happens to Ray, the driver goes on.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING

from budgetsearch.core.codec import decode, encode, read_json
from budgetsearch.engines.ray.messages import Down, FleetSpec
from budgetsearch.engines.worker import Pipe
from budgetsearch.machine.child import die_with_parent

if TYPE_CHECKING:
    from budgetsearch.engines.ray.cluster import Cluster

ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S_AUTOSCALER": "1000000000",
}
"""Without these Ray and Tune say and do things that belong into no run."""
ALONE: Mapping[str, str] = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""A local cluster listens on loopback only: Ray asks nobody for a password."""


def main() -> None:
    """Read what to start, then run the fleet until the input ends."""
    die_with_parent()
    pipe = Pipe()
    spec = decode(FleetSpec, read_json(sys.stdin.readline()))
    os.environ.update(ENVIRONMENT if spec.address else {**ENVIRONMENT, **ALONE})
    inbox = Inbox()
    # Ray reads its environment while it is imported, and that takes seconds.
    from budgetsearch.engines.ray import cluster

    try:
        if (reached := cluster.reach(spec, pipe)) is not None:
            inbox.pass_to(reached)
            reached.keep_lanes()
    except Exception as error:
        traceback.print_exc()
        pipe.write(encode(Down(f"{type(error).__name__}: {error}"[:1000])))
    finally:
        cluster.leave()


class Inbox:
    """What the driver says, read from the start: it may say no more while Ray is still being reached."""

    def __init__(self) -> None:
        self._cluster: Cluster | None = None
        self._reached = threading.Event()
        threading.Thread(target=self._read, daemon=True, name="orders").start()

    def pass_to(self, cluster: Cluster) -> None:
        """From now on orders go to the cluster's lanes."""
        self._cluster = cluster
        self._reached.set()

    def _read(self) -> None:
        for line in sys.stdin:
            self._reached.wait()  # orders are for lanes
            assert self._cluster is not None
            self._cluster.order(read_json(line))
        if self._cluster is not None:
            self._cluster.end()
        else:
            os._exit(0)  # what of a cluster of our own is there ends with this process


if __name__ == "__main__":
    main()
