"""The engine on Ray Tune: the contract on a real cluster of two nodes, and what can happen to its parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.records import Beat, WorkerSetup
from budgetsearch.engines.messages import FleetSpec
from budgetsearch.engines.ray_tune import RayEngine
from budgetsearch.testing import EngineContract, Harness
from budgetsearch.training.tokens import prepare

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two nodes, one CPU each, on this machine."""
    from ray.cluster_utils import Cluster

    store = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**store, "include_dashboard": False})
    made.add_node(**store)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def setup(
    tiny_model: Path, rows_file: Path, session_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> WorkerSetup:
    """A worker's setup with the tiny model."""
    data = prepare(tiny_model, str(rows_file), None, seed=0, max_length=128, cache=session_cache)
    return WorkerSetup(
        model_path=str(tiny_model),
        model_name=str(tiny_model),
        data_path=str(data.folder),
        checkpoint_path=str(tmp_path_factory.mktemp("checkpoints")),
        device="cpu",
        targets="all-linear",
        seed=0,
    )


@pytest.fixture(scope="module")
def engine(cluster: Any, setup: WorkerSetup) -> Iterator[RayEngine]:
    """Two lanes on the cluster."""
    folder = Path(setup.checkpoint_path)
    spec = FleetSpec(2, str(folder / "ray"), str(folder / "worker-{lane}.log"), address=cluster.address)
    made = RayEngine(setup, spec, folder / "ray.log")
    yield made
    made.close()


def wait_for_beat(engine: RayEngine) -> None:
    """Poll until a running job gives a sign of life."""
    for _ in range(240):
        if any(isinstance(report, Beat) for report in engine.poll(0.5)):
            return
    raise AssertionError("no heartbeat in two minutes")


class TestRay(EngineContract):
    """Lanes on Ray Tune, real training on the tiny model."""

    @pytest.fixture
    def harness(self, engine: RayEngine) -> Harness:
        """Real training of a tiny model."""
        return Harness(engine, 400, 50_000_000, lambda: wait_for_beat(engine))
