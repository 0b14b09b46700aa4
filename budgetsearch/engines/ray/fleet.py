"""The fleet's process: ``python -m budgetsearch.engines.ray.fleet``, JSON lines on its pipes.

It owns Ray beside the driver: it joins a cluster or starts one, lets Ray Tune keep a lane for each GPU
alive, and passes messages between driver and hub. So Ray's signal handlers, its threads and the ways in
which it ends a process stay away from the driver: whatever happens to Ray, the driver goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray import tune

from budgetsearch.core.codec import decode, encode
from budgetsearch.engines.ray.hub import Hub
from budgetsearch.engines.ray.lane import Lane
from budgetsearch.engines.ray.messages import Down, FleetSpec, Up
from budgetsearch.engines.worker import Pipe, die_with_parent

CLOSE_SECONDS = 2.0
"""Lanes get so long to end their workers; then Ray is left as it is."""
LISTEN_SECONDS = 5.0
REACH_SECONDS = 20.0
"""A head gets so long to answer. Ray itself would try for minutes, and say nothing of the address."""
LOOK_SECONDS = 0.5
LOOPBACK = "127.0.0.1"
STORE_BYTES = 128 * 2**20
"""Object store of a local cluster: messages are small, and nothing big is put there."""
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
LEAVING = threading.Event()
"""Set when this process ends on purpose: Ray's calls fail then, and that is no news.
Of the module, for Tune copies the objects that it is given."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    """Read what to start, then run the fleet until the input ends."""
    die_with_parent()
    pipe = Pipe()
    spec = decode(FleetSpec, json.loads(sys.stdin.readline()))
    os.environ.update(ENVIRONMENT if spec.address else {**ENVIRONMENT, **ALONE})
    inbox = Inbox()
    try:
        _run(spec, pipe, inbox)
    except Exception as error:
        traceback.print_exc()
        pipe.write(encode(Down(f"{type(error).__name__}: {error}"[:1000])))
    finally:
        _leave()


class Inbox:
    """What the driver says, read from the start: it may say no more while Ray is still being reached."""

    def __init__(self) -> None:
        self._hub: Any = None
        self._reached = threading.Event()
        threading.Thread(target=self._read, daemon=True, name="orders").start()

    def pass_to(self, hub: Any) -> None:
        """From now on orders go to the hub."""
        self._hub = hub
        self._reached.set()

    def _read(self) -> None:
        for line in sys.stdin:
            self._reached.wait()  # orders are for lanes, and those come with the hub
            _order(self._hub, json.loads(line))
        if self._reached.is_set():
            _end(self._hub)
        else:
            os._exit(0)  # what of a cluster of our own is there ends with this process


def _run(spec: FleetSpec, pipe: Pipe, inbox: Inbox) -> None:
    namespace = f"budgetsearch-{uuid.uuid4().hex[:8]}"
    context = _connect(spec, namespace)
    for number in STOPPING:  # Ray has set its own; they are the driver's to handle
        signal.signal(number, signal.SIG_IGN)
    if short := _shortage(spec):
        pipe.write(encode(Down(short, final=True)))
        return
    spec = replace(spec, lanes=spec.lanes or max(1, _gpus(spec)))
    pipe.write(encode(Up(context.address_info["address"], spec.lanes, context.dashboard_url or "")))
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    hub = (
        ray.remote(Hub)
        .options(name="hub", num_cpus=0, max_concurrency=10_000, scheduling_strategy=here)
        .remote()
    )
    threading.Thread(target=_listen, args=(hub, pipe), daemon=True, name="listen").start()
    inbox.pass_to(hub)
    keep_lanes(spec, "hub", namespace)


def _connect(spec: FleetSpec, namespace: str) -> Any:
    """Join the cluster, or start one that ends with this process."""
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


def _listen(hub: Any, pipe: Pipe) -> None:
    """Pass on what the lanes say."""
    try:
        while not LEAVING.is_set():
            for message in ray.get(hub.told.remote(LISTEN_SECONDS)):
                pipe.write(message)
    except Exception as error:
        if LEAVING.is_set():
            return  # or Ray's processes would be left to end by themselves
        pipe.write(encode(Down(f"the hub is gone ({type(error).__name__})")))
        os._exit(1)


def _order(hub: Any, order: Mapping[str, Any]) -> None:
    """Pass on what the driver says."""
    try:
        ray.get(hub.order.remote([order]))
    except Exception:  # the hub is gone: the listener says so
        traceback.print_exc()


def _end(hub: Any) -> None:
    """The driver says no more: let the lanes go, and do not wait for long."""
    LEAVING.set()
    threading.Timer(CLOSE_SECONDS, _leave).start()
    try:
        ray.get(hub.close.remote())
    except Exception:  # the hub is gone, and its lanes with it
        traceback.print_exc()


def _leave() -> None:
    """Leave Ray, a local cluster's processes included, and end."""
    LEAVING.set()
    try:
        ray.shutdown()
    finally:
        os._exit(0)


class Ending(tune.Stopper):  # type: ignore[misc]
    """Ends every lane once the fleet is to end, those that still wait for their resources included."""

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """No single lane is stopped."""
        return False

    def stop_all(self) -> bool:
        """Whether the fleet is to end."""
        return LEAVING.is_set()


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


if __name__ == "__main__":
    from budgetsearch.engines.ray import fleet

    fleet.main()  # of the module by its name, under which Tune finds ``Ending`` again
