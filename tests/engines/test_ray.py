"""The engine on Ray Tune: the contract on a real cluster of two nodes, and what can happen to its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from budgetsearch.core.codec import encode
from budgetsearch.core.events import Entry, SegmentEnded, SegmentStarted
from budgetsearch.core.records import SegmentResult, WorkerSetup
from budgetsearch.core.reports import Beat, JobEnded
from budgetsearch.engines.contract import EngineContract, Harness, await_end, segment, train_job
from budgetsearch.engines.ray import table
from budgetsearch.engines.ray.engine import RayEngine
from budgetsearch.engines.ray.messages import FleetSpec
from budgetsearch.storage.ledger import read_entries, read_history
from budgetsearch.storage.runfolder import RunFolder
from tests.support.faults.proofs import check_after_kill, check_end
from tests.support.faults.realrun import SPACE, Workplace, await_free

pytest.importorskip("ray")

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
RUN_SECONDS = 240.0
MARK = "BUDGETSEARCH_TEST_RAY"
"""A variable that everything inherits that these tests start."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two nodes, one CPU each, on this machine."""
    from ray.cluster_utils import Cluster

    os.environ[MARK] = uuid.uuid4().hex
    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    made.add_node(**NODE)
    yield made
    made.shutdown()
    del os.environ[MARK]


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
    for _ in range(600):
        if any(isinstance(report, Beat) for report in engine.poll(0.5)):
            return
    raise AssertionError("no heartbeat in five minutes")


class TestRay(EngineContract):
    """Lanes on Ray Tune, real training on the tiny model."""

    @pytest.fixture
    def harness(self, engine: RayEngine) -> Harness:
        """Real training of a tiny model."""
        return Harness(engine, 400, 50_000_000, lambda: wait_for_beat(engine))


def until(engine: RayEngine, lanes: int) -> None:
    """Poll until so many lanes live."""
    for _ in range(240):
        if engine.slots == lanes:
            return
        engine.poll(0.5)
    raise AssertionError(f"{engine.slots} lanes after two minutes, not {lanes}")


def ends(engine: RayEngine, count: int) -> list[JobEnded]:
    """The next ends of jobs."""
    found: list[JobEnded] = []
    for _ in range(240):
        found += [report for report in engine.poll(0.5) if isinstance(report, JobEnded)]
        if len(found) >= count:
            return found
    raise AssertionError("no end in five minutes")


def processes(name: str) -> list[psutil.Process]:
    """The processes of these tests whose command line holds a name."""
    found = []
    for process in psutil.process_iter():
        try:
            if name in " ".join(process.cmdline()) and process.environ().get(MARK) == os.environ[MARK]:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_a_lost_node_gives_its_job_back_and_one_that_comes_is_used(
    cluster: Any, engine: RayEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job on it comes back without a stain on its trial; the other goes on; a new node gets a lane."""
    monkeypatch.setattr(table, "SILENT_SECONDS", 12.0)
    engine.warm_up()
    until(engine, 2)
    jobs = [train_job(segment(trial, 50_000_000)) for trial in (1, 2)]
    for job in jobs:
        engine.submit(job)
    wait_for_beat(engine)
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    (lost,) = ends(engine, 1)
    (result,) = lost.results
    assert isinstance(result, SegmentResult)
    assert ("stranded", 0) == (result.status, result.tokens)
    assert 1 == engine.slots
    cluster.add_node(**NODE)
    (other,) = [job for job in jobs if job.job_id != lost.job_id]
    engine.cancel(other.job_id)
    (ended,) = ends(engine, 1)
    assert ended.job_id == other.job_id
    until(engine, 2)


@pytest.mark.slow
def test_a_lane_that_dies_is_started_again_by_tune(cluster: Any, engine: RayEngine) -> None:
    """Its process is killed, its worker goes with it, and soon there are two lanes again."""
    engine.warm_up()
    until(engine, 2)
    job = train_job(segment(1, 50_000_000))
    engine.submit(job)
    wait_for_beat(engine)
    workers = processes("budgetsearch.engines.worker")
    busy = max(workers, key=lambda process: process.cpu_times().user)
    parent = busy.parent()
    assert parent is not None
    parent.kill()
    psutil.wait_procs([busy], timeout=10)
    assert not busy.is_running()
    (ended,) = ends(engine, 1)
    (result,) = ended.results
    assert isinstance(result, SegmentResult)
    assert "stranded" == result.status
    until(engine, 2)


def tune_rows(folder: Path) -> list[dict[str, Any]]:
    """What Ray Tune wrote of segments that ended well."""
    files = list(folder.rglob("result.json"))
    rows = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row.get("status") == "ok"]


def test_results_are_where_ray_and_tensorboard_look_for_them(engine: RayEngine, setup: WorkerSetup) -> None:
    """Tune's results name trial, rung, loss and memory of each segment."""
    job = train_job(segment(5, 400))
    engine.submit(job)
    await_end(engine, job.job_id)
    until_rows = time.monotonic() + 30
    while not (rows := tune_rows(Path(setup.checkpoint_path) / "ray")):
        assert time.monotonic() < until_rows, "Ray Tune wrote nothing"
        time.sleep(0.2)
    assert {"trial", "rung", "loss", "tokens", "seconds", "peak_gib"} <= set(rows[0])
    assert list((Path(setup.checkpoint_path) / "ray").rglob("events.out.tfevents.*"))


def until_events(run: Path, kind: type[SegmentStarted | SegmentEnded], count: int) -> list[Entry]:
    """Wait until a run has so many events of a kind; returns its ledger's entries."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        entries = list(read_entries(RunFolder(run).ledger)) if RunFolder(run).has_ledger() else []
        if sum(isinstance(entry.event, kind) for entry in entries) >= count:
            return entries
        time.sleep(0.1)
    raise AssertionError(f"no {count} of {kind.__name__} in five minutes")


def started(entries: Sequence[Entry]) -> int:
    """How many segments have been started."""
    return sum(isinstance(entry.event, SegmentStarted) for entry in entries)


@pytest.mark.slow
def test_a_run_survives_a_killed_driver_a_stop_and_a_lost_node(
    cluster: Any, engine: RayEngine, tmp_path: Path
) -> None:
    """kill -9 of the driver, a clean stop by SIGTERM, a lost node: it ends in time, with the best adapter
    whole, nothing lost or charged twice, and its ledger gives the same decisions again."""
    engine.close()
    place, run, log = Workplace(tmp_path).make(), tmp_path / "run", tmp_path / "log"
    (tmp_path / "space.yaml").write_text(SPACE.replace("[fp32, nf4]", "[fp32]"), encoding="utf-8")
    where = ("--engine", "ray", "--gpus", "2", "--address", cluster.address)
    budget = ("--hours", str(RUN_SECONDS / 3600), "--max-trials", "3")
    first = place.start("run", "--out", str(run), *where, *budget, log=log)
    until_events(run, SegmentEnded, 1)
    first.kill()
    first.wait(timeout=10)
    await_free(run)
    seen = check_after_kill(run, [])
    second = place.start("resume", str(run), *where, log=log)
    until_events(run, SegmentStarted, 1 + started(seen))
    second.terminate()
    assert 75 == second.wait(timeout=60), log.read_text(encoding="utf-8")[-3000:]
    seen = check_after_kill(run, seen)
    closed = read_history(run / "ledger.sqlite").closed
    assert closed is not None and ("interrupted", "SIGTERM") == (closed.state, closed.signal)
    third = place.start("resume", str(run), *where, log=log)
    until_events(run, SegmentStarted, 1 + started(seen))
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    assert 0 == third.wait(timeout=2 * RUN_SECONDS), log.read_text(encoding="utf-8")[-3000:]
    check_end(run)
    check_after_kill(run, seen)


def test_the_fleet_ends_at_once_while_it_still_looks_for_its_cluster(tmp_path: Path) -> None:
    """A head that does not answer holds neither a stop nor the deadline up."""
    spec = FleetSpec(1, str(tmp_path), str(tmp_path / "worker-{lane}.log"), address="127.0.0.1:1")
    fleet = subprocess.Popen(
        [sys.executable, "-m", "budgetsearch.engines.ray.fleet"], stdin=subprocess.PIPE, text=True
    )
    assert fleet.stdin is not None
    fleet.stdin.write(json.dumps(encode(spec)) + "\n")
    fleet.stdin.flush()
    time.sleep(1.0)
    fleet.stdin.close()
    assert 0 == fleet.wait(timeout=4)


def test_nothing_is_left_running(cluster: Any, engine: RayEngine) -> None:
    """Whatever these tests started and killed: no lane, no worker, no fleet stays, and the cluster does."""
    engine.close()
    names = ("budgetsearch.engines.worker", "budgetsearch.engines.ray.fleet", "ray::Lane", "ray::Hub")
    until = time.monotonic() + 20
    while any(processes(name) for name in names):
        assert time.monotonic() < until, [process.cmdline() for name in names for process in processes(name)]
        time.sleep(0.2)
    assert processes("gcs_server")
