"""Ray as the fleet's process has it: a cluster, a hub on it, and Ray Tune that keeps the lanes alive."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune

from budgetsearch.core.codec import encode
from budgetsearch.engines.ray.hub import Hub
from budgetsearch.engines.ray.lane import Lane
from budgetsearch.engines.ray.messages import Down, FleetSpec, Up
from budgetsearch.engines.worker import Pipe

CLOSE_SECONDS = 2.0
"""Lanes get so long to end their workers; then Ray is left as it is."""
LISTEN_SECONDS = 5.0
REACH_SECONDS = 20.0
"""A head gets so long to answer. Ray itself would try for minutes, and say nothing of the address."""
LOOK_SECONDS = 0.5
LOOPBACK = "127.0.0.1"
STORE_BYTES = 128 * 2**20
"""Object store of a local cluster: messages are small, and nothing big is put there."""
HUB = "hub"
LEAVING = threading.Event()
"""Set when this process ends on purpose: Ray's calls fail then, and that is no news. Of the module, for Tune
copies the objects that it is given."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def reach(spec: FleetSpec, pipe: Pipe) -> Cluster | None:
    """Join the cluster, or start one that ends with this process; None where it lacks GPUs, which is said."""
    namespace = f"budgetsearch-{uuid.uuid4().hex[:8]}"
    context = _connect(spec, namespace)
    for number in STOPPING:  # Ray has set its own; they are the driver's to handle
        signal.signal(number, signal.SIG_IGN)
    if short := _shortage(spec):
        pipe.write(encode(Down(short, final=True)))
        return None
    spec = replace(spec, lanes=spec.lanes or max(1, _gpus(spec)))
    pipe.write(encode(Up(context.address_info["address"], spec.lanes, context.dashboard_url or "")))
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    hub = ray.remote(Hub).options(name=HUB, num_cpus=0, max_concurrency=10_000, scheduling_strategy=here)
    return Cluster(spec, namespace, hub.remote(), pipe)


def leave() -> None:
    """Leave Ray, a local cluster's processes included, and end."""
    LEAVING.set()
    try:
        ray.shutdown()
    finally:
        os._exit(0)


@dataclass(frozen=True)
class Cluster:
    """A cluster that was reached."""

    spec: FleetSpec
    namespace: str
    hub: Any
    """The hub's actor."""
    pipe: Pipe
    """To the driver."""

    def order(self, order: Mapping[str, Any]) -> None:
        """Pass on what the driver says."""
        try:
            ray.get(self.hub.order.remote([order]))
        except Exception:  # the hub is gone: the listener says so
            traceback.print_exc()

    def end(self) -> None:
        """The driver says no more: let the lanes go, and do not wait for long."""
        LEAVING.set()
        threading.Timer(CLOSE_SECONDS, leave).start()
        try:
            ray.get(self.hub.close.remote())
        except Exception:  # the hub is gone, and its lanes with it
            traceback.print_exc()

    def listen(self) -> None:
        """Pass on what the lanes say, until the fleet is to end or the hub is gone."""
        try:
            while not LEAVING.is_set():
                for message in ray.get(self.hub.told.remote(LISTEN_SECONDS)):
                    self.pipe.write(message)
        except Exception as error:
            if LEAVING.is_set():
                return  # or Ray's processes would be left to end by themselves
            self.pipe.write(encode(Down(f"the hub is gone ({type(error).__name__})")))
            os._exit(1)

    def keep_lanes(self) -> None:
        """Run the lanes until the fleet is to end."""
        threading.Thread(target=self.listen, daemon=True, name="listen").start()
        spec = self.spec
        config = {
            "lane": tune.grid_search(list(range(spec.lanes))),
            "hub": HUB,
            "namespace": self.namespace,
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
                name=f"lanes-{self.namespace}",
                storage_path=spec.folder,
                failure_config=tune.FailureConfig(max_failures=-1),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a lane keeps nothing
                stop=Ending(),
                verbose=0,
            ),
        ).fit()


class Ending(tune.Stopper):  # type: ignore[misc]
    """Ends every lane once the fleet is to end, those that still wait for their resources included."""

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """No single lane is stopped."""
        return False

    def stop_all(self) -> bool:
        """Whether the fleet is to end."""
        return LEAVING.is_set()


def _connect(spec: FleetSpec, namespace: str) -> Any:
    _await_head(spec.address)
    quiet = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    if spec.address:
        return ray.init(address=spec.address, **quiet)
    return ray.init(
        address="local",
        num_cpus=local_cpus(spec.lanes),
        object_store_memory=STORE_BYTES,
        include_dashboard=importlib.util.find_spec("aiohttp_cors") is not None,  # of ray[default]
        dashboard_host=LOOPBACK,
        **quiet,
    )


def _await_head(address: str) -> None:
    """Wait until somebody listens at an address; of ``auto`` Ray knows where that is.

    Raises:
        ConnectionError: nobody does.
    """
    host, colon, port = (os.environ.get("RAY_ADDRESS", "") if address == "auto" else address).rpartition(":")
    if not colon or not port.isdigit():
        return
    until = time.monotonic() + REACH_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS / 4).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ConnectionError(f"no Ray answers at {host}:{port} ({error})") from error
        time.sleep(LOOK_SECONDS)


def _shortage(spec: FleetSpec) -> str:
    """Why the lanes cannot all be started on this machine; a cluster's nodes may still come."""
    there = _gpus(spec)
    if spec.gpu == "cpu" or spec.address or there >= max(1, spec.lanes):
        return ""
    return f"--gpus {spec.lanes or 1} were asked for, but Ray sees {there} on this machine"


def _gpus(spec: FleetSpec) -> int:
    """How many GPUs Ray sees now, for lanes that take some."""
    return 0 if spec.gpu == "cpu" else int(ray.cluster_resources().get("GPU", 0))


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
