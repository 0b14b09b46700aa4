"""Ray Tune keeps the lanes alive: one trial for each, started again whenever it is lost.

This module imports Ray, so only the fleet's process imports it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune

from budgetsearch.engines.lane import Lane
from budgetsearch.engines.messages import FleetSpec

ENDING = threading.Event()
"""Set when the fleet is to end. Of the module, for Tune copies the objects that it is given."""


class Ending(tune.Stopper):  # type: ignore[misc]
    """Ends every lane once the fleet is to end, those that still wait for their resources included."""

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """No single lane is stopped."""
        return False

    def stop_all(self) -> bool:
        """Whether the fleet is to end."""
        return ENDING.is_set()


def keep_lanes(spec: FleetSpec, hub: str, namespace: str) -> None:
    """Run the lanes until the fleet is to end."""
    config = {
        "lane": tune.grid_search(list(range(spec.lanes))),
        "hub": hub,
        "namespace": namespace,
        "gpu": spec.gpu,
        "log": spec.log,
        "worker": spec.worker,
    }
    tune.Tuner(
        tune.with_resources(Lane, resources(spec)),
        param_space=config,
        tune_config=tune.TuneConfig(
            trial_name_creator=_name, trial_dirname_creator=_name, max_concurrent_trials=spec.lanes
        ),
        run_config=tune.RunConfig(
            name=f"lanes-{namespace}",
            storage_path=spec.folder,
            failure_config=tune.FailureConfig(max_failures=-1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a lane keeps nothing
            stop=Ending(),
            verbose=0,
        ),
    ).fit()


def resources(spec: FleetSpec) -> dict[str, float]:
    """What Ray sets aside for a lane. With a GPU no CPU: a machine may have fewer of them than GPUs, and
    whoever else holds them must not keep a GPU idle."""
    if spec.gpu != "cpu":
        return {"cpu": 0, "gpu": 1}
    return {"cpu": cpus_per_lane([int(node["Resources"].get("CPU", 0)) for node in ray.nodes()], spec.lanes)}


def cpus_per_lane(nodes: list[int], lanes: int) -> int:
    """The most CPUs for each lane with which all of them find room on nodes with so many; at least one."""
    for cpus in range(max(nodes, default=1), 1, -1):
        if sum(count // cpus for count in nodes) >= lanes:
            return cpus
    return 1


def local_cpus(lanes: int) -> int:
    """CPUs that a local cluster offers: a lane on a machine with fewer shares one."""
    return max(lanes, len(os.sched_getaffinity(0)))


def _name(trial: Any) -> str:
    return f"lane-{trial.config['lane']}"
