"""The parts of the engine on Ray Tune, each on its own: no Ray, no processes, virtual time."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from budgetsearch.core.codec import decode, encode
from budgetsearch.core.errors import EngineError, SettingsError
from budgetsearch.core.records import CalibrateJob, Calibration, Job, SegmentResult, WorkerSetup
from budgetsearch.core.reports import Beat, JobEnded, Notice, Report
from budgetsearch.engines.contract import await_end, segment, train_job
from budgetsearch.engines.local import MAX_DEATHS, most_deaths
from budgetsearch.engines.ray import cluster
from budgetsearch.engines.ray import engine as ray_tune
from budgetsearch.engines.ray.engine import RayEngine
from budgetsearch.engines.ray.hub import Hub
from budgetsearch.engines.ray.lane import Hands
from budgetsearch.engines.ray.messages import (
    Alive,
    FleetSpec,
    Gone,
    Halt,
    Hello,
    Said,
    Strike,
    Take,
    ToDriver,
    ToLane,
    Up,
)
from budgetsearch.engines.ray.table import (
    DELIVERY_SECONDS,
    EMPTY_SECONDS,
    MAX_FAILED,
    MAX_TRIES,
    REST_SECONDS,
    SILENT_SECONDS,
    Table,
)
from budgetsearch.run import choose_engine as execution
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.settings import Settings

SETUP = WorkerSetup("model", "model", "data", "checkpoints", "cpu", "all-linear", 0)


@dataclass
class Fleet:
    """A table under virtual time, and what it ordered."""

    size: int = 2
    now: float = 0.0
    table: Table = field(init=False)

    def __post_init__(self) -> None:
        self.table = Table(self.size, lambda: self.now)

    def up(self, number: int, life: str = "a") -> list[Report]:
        return self.table.hear(Hello(f"{number}-{life}", number, f"node{number}"))

    def place(self, job: Job) -> Take | None:
        """Place a job; returns the order that it comes to."""
        self.table.place(job, SETUP)
        return self.taken()

    def taken(self) -> Take | None:
        orders, self.table.orders = self.table.orders, []
        return next((order for order in orders if isinstance(order, Take)), None)

    def orders(self) -> list[ToLane]:
        orders, self.table.orders = self.table.orders, []
        return orders

    def pass_time(self, seconds: float, *beating: tuple[str, str]) -> list[Report]:
        """Let time pass while these lanes go on beating."""
        reports: list[Report] = []
        until = self.now + seconds
        while self.now < until:
            self.now += 1.0
            for lane, token in beating:
                reports += self.table.hear(Alive(lane, token))
            reports += self.table.tick()
        return reports


def job_of(quantization: str) -> Job:
    """A job on one quantization of the base."""
    one = segment(0, 100)
    return train_job(replace(one, params={**one.params, "quantization": quantization}))


def ended(job: Job) -> JobEnded:
    """The good end of a job."""
    return JobEnded(job.job_id, (SegmentResult(0, 0, "ok", 100),))


def results(reports: Sequence[Report]) -> list[Any]:
    """The results of the jobs that ended."""
    return [result for report in reports if isinstance(report, JobEnded) for result in report.results]


def test_jobs_go_to_the_lane_that_holds_their_quantization() -> None:
    """A base that is resident is not loaded again; one that is held by nobody goes to a fresh lane."""
    fleet = Fleet()
    fleet.up(0), fleet.up(1)
    first = fleet.place(job_of("nf4"))
    assert first is not None and first.lane == "0-a"
    fleet.table.hear(Said("0-a", first.token, ended(first.job)))
    second = fleet.place(job_of("bf16"))
    assert second is not None and second.lane == "1-a"
    fleet.table.hear(Said("1-a", second.token, ended(second.job)))
    for quantization, lane in (("bf16", "1-a"), ("nf4", "0-a")):
        again = fleet.place(job_of(quantization))
        assert again is not None and again.lane == lane


def test_a_job_waits_for_the_first_lane() -> None:
    """While the fleet starts, a job is kept, and placed as soon as a lane is there."""
    fleet = Fleet(size=1)
    job = job_of("fp32")
    assert fleet.place(job) is None
    with pytest.raises(EngineError, match=f"while job {job.job_id} runs"):
        fleet.table.place(job_of("fp32"), SETUP)
    fleet.up(0)
    placed = fleet.taken()
    assert placed is not None and placed.job == job


def test_a_waiting_job_that_is_cancelled_ends_at_once() -> None:
    """It has done nothing, so it comes back as if it had not begun."""
    fleet = Fleet()
    job = job_of("fp32")
    fleet.place(job)
    (result,) = results(fleet.table.cancel(job.job_id))
    assert ("stranded", 0) == (result.status, result.tokens)
    fleet.up(0)
    assert fleet.taken() is None


@pytest.mark.parametrize("proven", [False, True])
def test_a_lane_that_has_ended_jobs_may_be_lost_more_often(proven: bool) -> None:
    """Some configurations kill whoever tries them; one that has never ended a job is given up sooner."""
    fleet = Fleet(size=1)
    fleet.up(0, "first")
    if proven:
        placed = fleet.place(job_of("fp32"))
        assert placed is not None
        fleet.table.hear(Said("0-first", placed.token, ended(placed.job)))
    fleet.table.hear(Gone("0-first", "it went"))
    deaths = 0
    while deaths < 4 * MAX_DEATHS:
        fleet.up(0, str(deaths))
        if fleet.place(job_of("fp32")) is None:
            break
        fleet.table.hear(Gone(f"0-{deaths}", "it died"))
        deaths += 1
    assert most_deaths(proven=proven) == deaths


def test_a_silent_lane_is_lost_and_its_segment_counts_for_nothing() -> None:
    """The trial has done nothing wrong: its segment starts again from its checkpoint, on another lane."""
    fleet = Fleet()
    fleet.up(0), fleet.up(1)
    job = train_job(segment(7, 400, start=200, checkpoint="trial0007-before"))
    placed = fleet.place(job)
    assert placed is not None
    reports = fleet.pass_time(SILENT_SECONDS + 2, ("1-a", ""))
    (result,) = results(reports)
    assert ("stranded", 200, None) == (result.status, result.tokens, result.checkpoint_out)
    assert "starts again from its checkpoint" in result.detail
    assert any(isinstance(r, Notice) and "Worker 0 on node0 was lost" in r.text for r in reports)
    assert 1 == fleet.table.living


def test_what_a_lost_lane_says_later_is_ignored() -> None:
    """It was presumed lost, its job was issued again, and now its result comes: it would count twice."""
    fleet = Fleet()
    fleet.up(0), fleet.up(1)
    job = job_of("fp32")
    placed = fleet.place(job)
    assert placed is not None
    fleet.pass_time(SILENT_SECONDS + 2, ("1-a", ""))
    assert [] == fleet.table.hear(Said("0-a", placed.token, ended(job)))
    again = fleet.place(job)
    assert again is not None and again.lane == "1-a" and again.token != placed.token
    assert [] == fleet.table.hear(Said("1-a", placed.token, ended(job)))
    assert [ended(job)] == fleet.table.hear(Said("1-a", again.token, ended(job)))


def test_a_driver_that_stood_still_takes_nobody_for_lost() -> None:
    """Ctrl-Z and a minute later fg: what the lanes said meanwhile is still on its way."""
    fleet = Fleet(size=1)
    fleet.up(0)
    assert fleet.place(job_of("fp32")) is not None
    fleet.table.tick()
    fleet.now += 60.0
    assert [] == fleet.table.tick()
    assert ["stranded"] == [r.status for r in results(fleet.pass_time(SILENT_SECONDS + 2))]


def test_a_lane_that_was_only_silent_is_used_again() -> None:
    """A network or a machine that stands still for half a minute costs its segments, not its GPU: nobody
    starts such a lane again, for Ray Tune has missed nothing. What it still runs is ended first."""
    fleet = Fleet(size=1)
    fleet.up(0)
    placed = fleet.place(job_of("fp32"))
    assert placed is not None
    fleet.pass_time(SILENT_SECONDS + 2)
    assert 0 == fleet.table.living
    assert [] == fleet.table.hear(Alive("0-a", placed.token))
    assert [Strike("0-a", placed.token)] == fleet.orders()
    assert 1 == fleet.table.living
    assert fleet.place(job_of("fp32")) is None
    assert [] == fleet.table.hear(Said("0-a", placed.token, ended(placed.job)))
    again = fleet.taken()
    assert again is not None and (again.lane, again.token != placed.token) == ("0-a", True)


def test_a_silent_lane_that_was_replaced_stays_away() -> None:
    """Its number has a new life, on this machine or another."""
    fleet = Fleet(size=1)
    fleet.up(0)
    fleet.pass_time(SILENT_SECONDS + 2)
    fleet.up(0, life="b")
    assert [] == fleet.table.hear(Alive("0-a", ""))
    assert 1 == fleet.table.living
    placed = fleet.place(job_of("fp32"))
    assert placed is not None and placed.lane == "0-b"


def test_what_a_lane_said_before_its_order_came_may_be_heard_late() -> None:
    """The driver was busy elsewhere, with a store that hangs: the job runs, and is not given up."""
    fleet = Fleet(size=1)
    fleet.up(0)
    placed = fleet.place(job_of("fp32"))
    assert placed is not None
    fleet.now += 2 * DELIVERY_SECONDS
    heard = [Alive("0-a", ""), Alive("0-a", placed.token), Said("0-a", placed.token, ended(placed.job))]
    assert [ended(placed.job)] == [report for message in heard for report in fleet.table.hear(message)]
    assert [] == fleet.orders()


def test_a_lane_that_is_started_again_has_lost_its_job() -> None:
    """Ray Tune started it elsewhere before anybody noticed the silence."""
    fleet = Fleet(size=1)
    fleet.up(0)
    fleet.place(job_of("fp32"))
    (result,) = results(fleet.up(0, life="b"))
    assert "stranded" == result.status
    assert 1 == fleet.table.living


def test_an_order_that_never_arrived_is_found_out() -> None:
    """The lane lives and goes on saying that it is idle: the job is issued again."""
    fleet = Fleet(size=1)
    fleet.up(0)
    placed = fleet.place(job_of("fp32"))
    assert placed is not None
    assert [] == results(fleet.pass_time(DELIVERY_SECONDS - 1, ("0-a", "")))
    assert ["stranded"] == [r.status for r in results(fleet.pass_time(3, ("0-a", "")))]
    assert 1 == fleet.table.living


def test_a_killed_job_is_over_though_its_lane_cannot_answer() -> None:
    """The deadline does not wait for a machine; the lane takes jobs again once it is idle."""
    fleet = Fleet(size=1)
    fleet.up(0)
    job = job_of("fp32")
    placed = fleet.place(job)
    assert placed is not None
    assert ["crashed"] == [r.status for r in results(fleet.table.kill(job.job_id))]
    assert [Strike("0-a", placed.token)] == fleet.orders()
    assert fleet.place(job_of("fp32")) is None
    fleet.table.hear(Alive("0-a", placed.token))
    assert [Strike("0-a", placed.token)] == fleet.orders()
    fleet.table.hear(Alive("0-a", ""))
    assert fleet.taken() is not None


def test_a_lane_whose_job_cannot_be_ended_is_no_slot() -> None:
    """Its worker process hangs in the kernel: the others go on without it."""
    fleet = Fleet()
    fleet.up(0), fleet.up(1)
    job = job_of("fp32")
    placed = fleet.place(job)
    assert placed is not None
    fleet.table.kill(job.job_id)
    assert 2 == fleet.table.living
    fleet.pass_time(DELIVERY_SECONDS + 2, ("0-a", placed.token), ("1-a", ""))
    assert 1 == fleet.table.living


def test_cancel_reaches_the_lane() -> None:
    """The order names the job's token, so it can only meet this job."""
    fleet = Fleet()
    fleet.up(0)
    job = job_of("fp32")
    placed = fleet.place(job)
    assert placed is not None
    assert [] == fleet.table.cancel(job.job_id)
    assert [Halt("0-a", placed.token)] == fleet.orders()


def test_a_calibration_moves_to_another_lane() -> None:
    """Nobody issues it again, so the table does, a few times."""
    fleet = Fleet(size=1)
    job = CalibrateJob(-1, "fp32", ranks=(4,), batch_size=4, limit_seconds=600.0)
    fleet.up(0)
    fleet.place(job)
    for life in range(1, MAX_TRIES):
        assert [] == results(fleet.up(0, life=str(life)))
        assert fleet.taken() is not None
    (result,) = results(fleet.up(0, life="last"))
    assert isinstance(result, Calibration) and result.status == "crashed"


def test_a_lane_that_only_loses_jobs_is_used_no_more() -> None:
    """A machine with a broken card would take one job after the other down with it."""
    fleet = Fleet()
    fleet.up(0)
    for life in range(5):
        fleet.up(0, life=str(life))
        fleet.place(job_of("fp32"))
        fleet.table.hear(Gone(f"0-{life}", "no card"))
    fleet.up(0, life="again")
    assert 0 == fleet.table.living
    fleet.up(1)
    placed = fleet.place(job_of("fp32"))
    assert placed is not None and placed.lane == "1-a"


def crashed(job: Job) -> JobEnded:
    """The end of a job in which something was missing."""
    return JobEnded(job.job_id, (SegmentResult(0, 0, "crashed", 0, detail="no such file: model"),))


def unread(job: Job) -> JobEnded:
    """The end of a job where the folder of the checkpoints is not mounted."""
    return JobEnded(job.job_id, (SegmentResult(0, 0, "unread", 0, detail="no such file: sign"),))


def run_on(fleet: Fleet, lane: str, end: Callable[[Job], JobEnded]) -> list[Report]:
    """Let a lane, the only one that is free, end a job in one way or the other."""
    placed = fleet.place(job_of("fp32"))
    assert placed is not None and placed.lane == lane
    return fleet.table.hear(Said(lane, placed.token, end(placed.job)))


@pytest.mark.parametrize("failed", [crashed, unread])
def test_a_lane_whose_jobs_all_fail_does_not_get_all_jobs(failed: Callable[[Job], JobEnded]) -> None:
    """Its machine lacks the base model, so it is free again at once, while the others work for minutes."""
    fleet = Fleet()
    fleet.up(0)
    run_on(fleet, "0-a", ended)
    busy = fleet.place(job_of("fp32"))
    fleet.up(1)
    for _ in range(MAX_FAILED - 1):
        assert 1 == len(run_on(fleet, "1-a", failed))
    notice, _ = run_on(fleet, "1-a", failed)
    assert isinstance(notice, Notice) and "Worker 1 on node1 gets no jobs" in notice.text
    assert "no such file: " in notice.text
    assert (1, None) == (fleet.table.living, fleet.place(job_of("fp32")))
    assert busy is not None
    fleet.pass_time(REST_SECONDS + 1, ("0-a", busy.token), ("1-a", ""))
    again = fleet.taken()
    assert again is not None and again.lane == "1-a"


def test_where_jobs_crash_everywhere_no_lane_is_to_blame() -> None:
    """The trials are, or the data."""
    fleet = Fleet(size=1)
    fleet.up(0)
    for _ in range(2 * MAX_FAILED):
        assert 1 == len(run_on(fleet, "0-a", crashed))
    assert 1 == fleet.table.living


def test_a_lane_that_never_comes_up_says_why() -> None:
    """Its machine has another card: Ray Tune tries again and again, and the end names the reason."""
    fleet = Fleet()
    assert [] == fleet.table.hear(Gone("0-a", "--gpu a100 needs 40 GiB"))
    with pytest.raises(EngineError, match="worker 0-a: --gpu a100 needs 40 GiB"):
        fleet.pass_time(EMPTY_SECONDS + 5)


def test_without_a_lane_for_long_the_engine_gives_up_with_the_last_words() -> None:
    """A cluster without a free GPU must not eat the whole budget."""
    fleet = Fleet()
    fleet.up(0)
    fleet.table.hear(Gone("0-a", "the driver is too old"))
    with pytest.raises(EngineError, match=r"driver is too old.*ray status.*resume RUN"):
        fleet.pass_time(EMPTY_SECONDS + 5)


HELLO = """
import json, os, signal, sys
spec = json.loads(sys.stdin.readline())
def say(**message):
    print(json.dumps(message), flush=True)
say(**{"is": "Up", "address": "here", "lanes": 1, "dashboard": "127.0.0.1:8265"})
say(**{"is": "Hello", "lane": "0-a", "number": 0, "node": "here"})
"""
DIES_WITH_A_JOB = HELLO + "sys.stdin.readline()"
NEVER_COMES = """
import sys
sys.stdin.readline()
print('{"is": "Down", "reason": "ConnectionError: nobody is there"}', flush=True)
"""
SHORT = NEVER_COMES.replace('"}', '", "final": true}')
HANGS = HELLO + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nimport time\ntime.sleep(60)"


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[RayEngine, list[int]]]:
    """An engine whose fleet is a script, and the processes that were started."""
    monkeypatch.setattr(ray_tune, "RETRY_SECONDS", 0.0)

    def make(code: str) -> tuple[RayEngine, list[int]]:
        real, started = subprocess.Popen, list[int]()

        def popen(arguments: list[str], **options: Any) -> Any:
            process = real([sys.executable, "-c", code], **options)
            started.append(process.pid)
            return process

        monkeypatch.setattr(ray_tune.subprocess, "Popen", popen)
        spec = FleetSpec(1, str(tmp_path), str(tmp_path / "worker-{lane}.log"))
        return RayEngine(SETUP, spec, tmp_path / "ray.log"), started

    return make


def test_a_fallen_fleet_is_started_again_until_it_falls_too_often(
    scripted: Callable[[str], tuple[RayEngine, list[int]]],
) -> None:
    """Its jobs come back without a stain; one that falls with every job is given up, with its log."""
    engine, started = scripted(DIES_WITH_A_JOB)
    engine.warm_up()
    for _ in range(ray_tune.MAX_FALLS):
        while engine.slots == 0 or engine._process is None:
            engine.poll(0.1)
        job = train_job(segment(1, 100))
        engine.submit(job)
        (result,) = await_end(engine, job.job_id).results
        assert isinstance(result, SegmentResult) and "stranded" == result.status
    with pytest.raises(EngineError, match=r"Ray cannot be used.*ray\.log.*resume RUN"):
        engine.poll(1.0)
    assert ray_tune.MAX_FALLS == len(started)
    engine.close()


@pytest.mark.parametrize(("code", "starts"), [(NEVER_COMES, ray_tune.MAX_FALLS), (SHORT, 1)])
def test_a_cluster_that_was_never_there_is_given_up_soon(
    scripted: Callable[[str], tuple[RayEngine, list[int]]], code: str, starts: int
) -> None:
    """A wrong address, or fewer GPUs than asked for: with what Ray said."""
    engine, started = scripted(code)
    engine.warm_up()
    reports: list[Report] = []

    def poll_for_ever() -> None:
        while True:
            reports.extend(engine.poll(0.1))

    with pytest.raises(EngineError, match="nobody is there"):
        poll_for_ever()
    assert starts == len(started)
    notice = Notice(0, "Ray is not there (ConnectionError: nobody is there); it is tried again.")
    assert [notice] * (starts - 1) == reports
    engine.close()


def test_a_fleet_that_hangs_is_killed(
    scripted: Callable[[str], tuple[RayEngine, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing takes no longer than it may, and the dashboard's address has been said."""
    monkeypatch.setattr(ray_tune, "CLOSE_SECONDS", 0.2)
    engine, _ = scripted(HANGS)
    engine.warm_up()
    reports: list[Report] = []
    while engine.slots < 1:
        reports += engine.poll(0.1)
    assert [Notice(0, "Ray's dashboard is at http://127.0.0.1:8265")] == reports
    process = engine._process
    assert process is not None
    engine.close()
    assert process.poll() is not None


DEAF = HELLO + "import time\ntime.sleep(60)"


def test_a_fleet_that_reads_nothing_holds_nobody_up(
    scripted: Callable[[str], tuple[RayEngine, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call to Ray hangs in it: more orders than a pipe holds do not block the driver, nor does its end."""
    monkeypatch.setattr(ray_tune, "CLOSE_SECONDS", 0.2)
    engine, _ = scripted(DEAF)
    engine.warm_up()
    while engine.slots < 1:
        engine.poll(0.1)
    engine.prepare(replace(SETUP, model_path="x" * 2**20))
    for _ in range(2):
        job = train_job(segment(1, 100))
        engine.submit(job)
        engine.kill(job.job_id)
    engine.close()
    until = time.monotonic() + 5
    while any(thread.name == "outbox" for thread in threading.enumerate()):
        assert time.monotonic() < until, "the thread that writes is left behind"
        time.sleep(0.01)


def test_what_arrives_while_the_first_card_is_waited_for_is_kept(
    scripted: Callable[[str], tuple[RayEngine, list[int]]],
) -> None:
    """The address of Ray's dashboard, for one."""
    engine, _ = scripted(DEAF)
    engine.warm_up()
    assert engine.await_card(0.0) is None
    while engine.slots < 1:
        assert engine.await_card(0.1) is None
    assert [Notice(0, "Ray's dashboard is at http://127.0.0.1:8265")] == engine.poll(0.0)
    engine.end()
    engine.close()


def test_an_address_at_which_nobody_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try for minutes; a head that starts meanwhile is waited for."""
    monkeypatch.setattr(cluster, "REACH_SECONDS", 0.2)
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.01)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=rf"no Ray answers at {address} \("):
            cluster._await_head(address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConnectionError, match=address):
            cluster._await_head("auto")
        threading.Timer(0.05, server.listen).start()
        cluster._await_head(address)
    monkeypatch.delenv("RAY_ADDRESS")
    cluster._await_head("auto")
    cluster._await_head("")


@pytest.mark.parametrize(("leaves", "codes"), [(True, []), (False, [1])])
def test_a_fleet_that_leaves_is_not_ended_by_the_hub_that_goes(
    leaves: bool, codes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving Ray takes a moment, and its calls fail at once: whoever listens must not end the process then,
    for Ray's own processes would stay for a minute."""
    leaving, ended, said = threading.Event(), list[int](), list[object]()

    def get(asked: object) -> object:
        if leaves:
            leaving.set()
        raise ConnectionError("Ray is not connected")

    told = SimpleNamespace(told=SimpleNamespace(remote=lambda timeout: None))
    monkeypatch.setattr(cluster, "LEAVING", leaving)
    monkeypatch.setattr(cluster, "ray", SimpleNamespace(get=get))
    monkeypatch.setattr(cluster.os, "_exit", ended.append)
    pipe = SimpleNamespace(write=said.append)
    cluster.Cluster(FleetSpec(1, "folder", "log"), "", told, pipe).listen()  # type: ignore[arg-type]
    assert (codes, len(codes)) == (ended, len(said))


@dataclass
class FakeLine:
    """Orders in a list; messages as records. Without another order the fleet ends."""

    rounds: list[list[ToLane]]
    told: list[ToDriver] = field(default_factory=list)

    def orders(self, timeout: float) -> Sequence[Mapping[str, Any]] | None:
        return [encode(order) for order in self.rounds.pop(0)] if self.rounds else None

    def tell(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self.told += [decode(ToDriver, message) for message in messages]


@dataclass
class FakeEngine:
    """Reports that come with each poll; what was asked of it."""

    reports: list[list[Report]] = field(default_factory=list)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    broken: str = ""

    def warm_up(self) -> None:
        self.asked.append(("warm up", None))

    def prepare(self, setup: WorkerSetup) -> None:
        self.asked.append(("prepare", setup.device))

    def submit(self, job: Job) -> None:
        if self.broken:
            raise EngineError(self.broken)
        self.asked.append(("submit", job.job_id))

    def poll(self, timeout: float) -> list[Report]:
        return self.reports.pop(0) if self.reports else []

    def cancel(self, job_id: int) -> None:
        self.asked.append(("cancel", job_id))

    def kill(self, job_id: int) -> None:
        self.asked.append(("kill", job_id))

    def close(self) -> None:
        self.asked.append(("close", None))


def hands(line: FakeLine, engine: FakeEngine) -> Hands:
    """The hands of a lane with a card of its own."""
    return Hands(Hello("0-a", 0, "here"), line, engine, lambda s: replace(s, device="cuda:0"))  # type: ignore[arg-type]


def test_hands_run_a_job_and_tell_the_driver_and_tune() -> None:
    """The worker process is started before there is a job for it. Its reports carry the job's token; each
    segment is a result for Ray Tune."""
    job = train_job(segment(3, 100))
    done = JobEnded(job.job_id, (SegmentResult(3, 0, "ok", 100, loss=1.5, peak_bytes=2**30),))
    line = FakeLine([[Take("0-a", "5.1", SETUP, job)], [], [Halt("0-a", "5.1")], []])
    engine = FakeEngine([[Beat(job.job_id, 3, "train")], [], [done]])
    worker = hands(line, engine)
    worker.work()
    assert [
        ("warm up", None),
        ("prepare", "cuda:0"),
        ("submit", job.job_id),
        ("cancel", job.job_id),
        ("close", None),
    ] == engine.asked
    said = [message for message in line.told if isinstance(message, Said)]
    assert [("5.1", "Beat"), ("5.1", "JobEnded")] == [(s.token, type(s.report).__name__) for s in said]
    row = worker.rows.get_nowait()
    assert row is not None
    assert (3, 0, 1.5, 1.0) == (row["trial"], row["rung"], row["loss"], row["peak_gib"])
    assert worker.rows.get_nowait() is None
    assert "" == worker.failure


def test_hands_leave_a_job_alone_that_another_order_means() -> None:
    """An order for a job that was given up must not meet the next one."""
    job = train_job(segment(3, 100))
    line = FakeLine([[Take("0-a", "5.1", SETUP, job)], [Halt("0-a", "4.0"), Strike("0-a", "4.0")]])
    engine = FakeEngine()
    hands(line, engine).work()
    assert {"warm up", "prepare", "submit", "close"} == {name for name, _ in engine.asked}


def test_hands_that_cannot_work_say_why_and_fail() -> None:
    """Ray Tune starts the lane again, and the driver knows at once that its job is lost."""
    line = FakeLine([[Take("0-a", "5.1", SETUP, train_job(segment(3, 100)))]])
    worker = hands(line, FakeEngine(broken="The card does not answer any more."))
    worker.work()
    assert Gone("0-a", "The card does not answer any more.") == line.told[-1]
    assert worker.failure


def test_the_hub_keeps_messages_until_they_are_fetched() -> None:
    """Each is fetched once, in its order; closing lets everyone who waits go."""

    async def play() -> None:
        hub = Hub()
        await hub.order([{"lane": "0-a", "n": 1}, {"lane": "1-a", "n": 2}, {"lane": "0-a", "n": 3}])
        assert [1, 3] == [order["n"] for order in await hub.orders("0-a", 5) or []]
        assert [] == await hub.orders("0-a", 0.01)
        waiting = asyncio.create_task(hub.told(5))
        await asyncio.sleep(0)
        await hub.tell([{"n": 4}])
        assert [{"n": 4}] == await waiting
        asking = asyncio.create_task(hub.orders("0-a", 5))
        await asyncio.sleep(0)
        await hub.close()
        assert await asking is None

    asyncio.run(play())


CPU = {"gpu": "cpu", "model": "m", "data": "d", "space": "lora_small", "max_length": 64, "batch_size": 4}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gpus": 8}, "--gpus 8 needs --engine ray"),
        ({"address": "auto"}, "needs --engine ray"),
        ({"engine": "ray", "address": "ray://head:10001"}, "ray job submit"),
        ({"engine": "ray", "address": "auto", "gpu": "auto"}, "--address needs --gpu"),
        ({"engine": "ray", "device": 0}, "CUDA_VISIBLE_DEVICES"),
        ({"engine": "slurm"}, "--engine must be local or ray"),
        ({"gpus": 0}, "--gpus must be a whole number of at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Before anything is touched, with what to do."""
    with pytest.raises(SettingsError, match=said):
        execution.check_engine(load_settings({**CPU, **given}, cwd=tmp_path))


def test_without_ray_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optional dependency is guarded once."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    with pytest.raises(SettingsError, match=r'pip install "budgetsearch\[ray\]"'):
        execution.check_engine(load_settings({**CPU, "engine": "ray"}, cwd=tmp_path))


def test_a_run_can_go_on_on_another_engine(tmp_path: Path) -> None:
    """Local after Ray drops what only Ray understands; another cluster replaces the address."""
    ray: Settings = load_settings({**CPU, "engine": "ray", "gpus": 4, "address": "auto"}, cwd=tmp_path)
    local = execution.moved(ray, {"engine": "local"})
    assert ("local", None, None) == (local.engine, local.gpus, local.address)
    there = execution.moved(ray, {"gpus": 2, "address": "head:6379"})
    assert ("ray", 2, "head:6379") == (there.engine, there.gpus, there.address)
    assert ray == execution.moved(ray, {})


def test_importing_the_package_or_asking_for_help_imports_no_ray() -> None:
    """Ray takes seconds to import and is optional; the driver's process never needs it."""
    code = (
        "import sys, budgetsearch.api, budgetsearch.run.choose_engine, budgetsearch.engines.ray.engine\n"
        "from typer.testing import CliRunner\nfrom budgetsearch.cli import app\n"
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_messages_survive_the_way() -> None:
    """Everything that travels is JSON."""
    for message in (Up("here:1", 2, "http://127.0.0.1:8265"), Said("0-a", "1.1", Beat(1, 2, "train"))):
        assert message == decode(ToDriver, encode(message))


def test_cpus_are_shared_so_that_every_lane_finds_room() -> None:
    """As many for each as there can be; one where there are too few."""
    tuning = pytest.importorskip("budgetsearch.engines.ray.cluster")
    assert [4, 2, 1, 1, 3] == [
        tuning.cpus_per_lane(*case) for case in (([8], 2), ([4], 2), ([3, 3], 6), ([1], 4), ([3, 3], 2))
    ]


def test_a_lane_with_a_gpu_waits_for_no_cpu() -> None:
    """A container of eight GPUs and four cores has eight lanes."""
    tuning = pytest.importorskip("budgetsearch.engines.ray.cluster")
    assert {"cpu": 0, "gpu": 1} == tuning.resources(FleetSpec(8, "folder", "log", gpu="a100"))


def test_the_log_of_a_worker_on_another_machine_is_of_this_user(tmp_path: Path) -> None:
    """Another user's file of the same name could not be opened, and no worker would start."""
    lane = pytest.importorskip("budgetsearch.engines.ray.lane")
    here = tmp_path / "run" / "ray" / "worker-{lane}.log"
    assert lane._log(str(here), 3).name == f"budgetsearch-{os.getuid()}-run-worker-3.log"
    here.parent.mkdir(parents=True)
    assert lane._log(str(here), 3) == here.parent / "worker-3.log"
