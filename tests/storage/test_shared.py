"""Checkpoints behind a URL or in a shared folder: whole or not there, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import (
    CheckpointError,
    DiskError,
    RunFolderError,
    SettingsError,
    UnreadableError,
)
from budgetsearch.core.events import Opened
from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Score,
    ScoreJob,
    Segment,
    SegmentResult,
    TrainJob,
    WorkerSetup,
)
from budgetsearch.core.reports import CardUse, JobEnded
from budgetsearch.core.resources.disk import DiskNeed
from budgetsearch.engines.local import LocalEngine
from budgetsearch.engines.shared import LOCK, PREFIX, Copies, Courier, Mounted
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.run import manifest
from budgetsearch.run import preflight as room
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.export import AdapterExporter, SharedExporter, exporter_for, mend
from budgetsearch.run.incumbent import Incumbent
from budgetsearch.run.settings import Settings
from budgetsearch.run.spaces import load_space
from budgetsearch.storage.checkpoint_store import MARKER, CheckpointStore, Patience
from budgetsearch.storage.ledger import Ledger, read_history
from budgetsearch.storage.ownership import SIGN, claim
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.storage.shared import (
    begin_place,
    check_shared,
    find_place,
    folder_of,
    leave_place,
    open_store,
    own_place,
    url_of,
)
from budgetsearch.tools.doctor import examine, host
from budgetsearch.tools.doctor.model import ModelFacts
from budgetsearch.training.sums import ADAPTER_FILE, META_FILE, STATE_FILE, SUMMED, describe
from tests.support.factories import FACTS, MODEL, Story, whole_run
from tests.support.training import make_segment

NAME = "trial0003-rung0-tokens1500-attempt0"


class Time:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, [0.0][:0]

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


class Flaky:
    """A file system some of whose calls fail: ``trouble`` gets the method and its arguments first."""

    def __init__(self, files: Any, trouble: Callable[..., None]) -> None:
        self._files, self._trouble = files, trouble

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._files, name)
        if not callable(real):
            return real

        def act(*args: Any, **options: Any) -> Any:
            self._trouble(name, *args)
            return real(*args, **options)

        return act


@pytest.fixture
def url() -> Iterator[str]:
    """A place of its own in fsspec's memory."""
    place = f"memory://{uuid.uuid4().hex}/runs/mine"
    yield place
    leave_place(place)


@pytest.fixture
def time() -> Time:
    """Starts at 0."""
    return Time()


@pytest.fixture
def store(url: str, time: Time) -> CheckpointStore:
    """Empty; its waits take no time."""
    begin_place(url)
    return open_store(url, Patience(clock=time, sleep=time.sleep))


def checkpoint(parent: Path, name: str = NAME, word: str = "") -> Path:
    """The files of a checkpoint, with their sums."""
    folder = parent / name
    folder.mkdir(parents=True)
    for file in SUMMED:
        (folder / file).write_text(f"{name}/{file}{word}", encoding="utf-8")
    (folder / META_FILE).write_text(json.dumps(describe(folder)), encoding="utf-8")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """What a folder holds."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def troubled(store: CheckpointStore, trouble: Callable[..., None]) -> CheckpointStore:
    """The same store over a connection that fails."""
    return dataclasses.replace(store, files=Flaky(store.files, trouble))


# -------------------------------------------------------------------------- the store


def test_a_checkpoint_comes_back_as_it_went(store: CheckpointStore, tmp_path: Path) -> None:
    """Every file, byte for byte; or only those that are wanted."""
    folder = checkpoint(tmp_path)
    store.put(folder, NAME)
    store.get(NAME, tmp_path / "back")
    store.get(NAME, tmp_path / "part", [ADAPTER_FILE])
    assert content(folder) == content(tmp_path / "back")
    assert {ADAPTER_FILE} == set(content(tmp_path / "part"))
    assert ({NAME}, {}) == (store.names(), store.flaws([NAME]))


@pytest.mark.parametrize("after", range(5))
def test_an_upload_that_was_cut_is_no_checkpoint(store: CheckpointStore, tmp_path: Path, after: int) -> None:
    """Wherever it was cut, even before the marker: it does not exist, and a sweep finds what is left."""
    done: list[str] = []

    def cut(method: str, *args: Any) -> None:
        if method == "put_file":
            done.append(args[1])
            if len(done) > after:
                raise PermissionError("gone")

    folder = checkpoint(tmp_path)
    with pytest.raises(DiskError, match="cannot be written"):
        troubled(store, cut).put(folder, NAME)
    assert {NAME} == set(store.flaws([NAME]))
    with pytest.raises(CheckpointError, match="not there, or its upload never ended"):
        store.get(NAME, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    store.remove(NAME)
    assert set() == store.names()


def test_a_second_upload_that_is_cut_leaves_the_first_whole(store: CheckpointStore, tmp_path: Path) -> None:
    """Another worker writes the same name with other bytes and dies: the first one still comes back."""
    first, second = checkpoint(tmp_path / "1"), checkpoint(tmp_path / "2", word="else")
    store.put(first, NAME)

    def cut(method: str, *args: Any) -> None:
        if method == "put_file" and args[1].endswith(MARKER):
            raise PermissionError("gone")

    with pytest.raises(DiskError):
        troubled(store, cut).put(second, NAME)
    store.get(NAME, tmp_path / "back")
    assert content(first) == content(tmp_path / "back")
    store.put(second, NAME)
    store.get(NAME, tmp_path / "later")
    assert content(second) == content(tmp_path / "later")


@pytest.mark.parametrize("damage", ["changed", "short", "gone", "marker", "foreign"])
def test_damage_is_told_from_absence_and_never_handed_out(
    store: CheckpointStore, tmp_path: Path, damage: str
) -> None:
    """Altered, cut short or missing objects, a marker that is no JSON or names a path: all are damage."""
    store.put(checkpoint(tmp_path), NAME)
    marker = f"{store.root}/{NAME}/{MARKER}"
    listed = json.loads(store.files.cat_file(marker))
    key = f"{store.root}/{NAME}/{listed['files'][STATE_FILE]['object']}"
    if damage == "changed":
        store.files.pipe_file(key, store.files.cat_file(key)[::-1])
    elif damage == "short":
        store.files.pipe_file(key, b"x")
    elif damage == "gone":
        store.files.rm_file(key)
    elif damage == "marker":
        store.files.pipe_file(marker, b'{"format": 1, "fil')
    else:
        listed["files"]["../evil"] = listed["files"].pop(STATE_FILE)
        store.files.pipe_file(marker, json.dumps(listed).encode())
    with pytest.raises(CheckpointError, match="is damaged"):
        store.get(NAME, tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "evil").exists()
    assert ({NAME} if damage != "changed" else set()) == set(store.flaws([NAME]))


def test_what_passes_is_tried_again_for_a_bounded_time(
    store: CheckpointStore, time: Time, tmp_path: Path
) -> None:
    """Two lost connections cost a second and a half; a service that stays away, no more than its time."""
    left = [2]

    def lost(method: str, *args: Any) -> None:
        if method == "put_file" and left[0]:
            left[0] -= 1
            raise ConnectionError("reset by peer")

    troubled(store, lost).put(checkpoint(tmp_path), NAME)
    assert [0.5, 1.0] == time.waits
    store.get(NAME, tmp_path / "back")
    left[0], began = 10**6, time.now
    with pytest.raises(DiskError, match=r"ConnectionError: reset by peer\); look at the network"):
        troubled(store, lost).put(tmp_path / NAME, "trial0004")
    assert 15.0 <= time.now - began <= 30.0


def test_a_job_that_was_cancelled_waits_for_no_store(
    store: CheckpointStore, time: Time, tmp_path: Path
) -> None:
    """Each thing is tried once more at most; else the worker would be killed, as if it were to blame."""

    def lost(method: str, *args: Any) -> None:
        if method == "put_file":
            raise ConnectionError("reset by peer")

    hurried = dataclasses.replace(store.patience, hurried=lambda: time.now > 2.0)
    with pytest.raises(DiskError, match="reset by peer"):
        dataclasses.replace(troubled(store, lost), patience=hurried).put(checkpoint(tmp_path), NAME)
    assert [0.5, 1.0, 1.0] == time.waits


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError("Forbidden"), "credentials on every machine"),
        (type("NoCredentialsError", (Exception,), {})("Unable to locate them"), "credentials on every"),
        (FileNotFoundError("no such bucket"), "make the bucket"),
    ],
)
def test_what_cannot_pass_is_told_at_once(
    store: CheckpointStore, time: Time, tmp_path: Path, error: Exception, words: str
) -> None:
    """Missing rights, credentials or buckets: no second try, and the message says what to do."""

    def refuse(method: str, *args: Any) -> None:
        if method in ("put_file", "makedirs"):
            raise error

    with pytest.raises(DiskError, match=words):
        troubled(store, refuse).put(checkpoint(tmp_path), NAME)
    assert [] == time.waits


def test_a_download_that_was_cut_is_made_once_more(store: CheckpointStore, tmp_path: Path) -> None:
    """The first copy comes short, as a lost connection leaves it; the second is whole."""
    store.put(checkpoint(tmp_path), NAME)
    real, calls = store.files, [0]

    class Short:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def get_file(self, key: str, target: str) -> None:
            calls[0] += 1
            if calls[0] == 1:
                Path(target).write_bytes(b"")
            else:
                real.get_file(key, target)

    dataclasses.replace(store, files=Short()).get(NAME, tmp_path / "back")
    assert content(tmp_path / NAME) == content(tmp_path / "back")


def test_an_unreachable_store_says_nothing_of_what_is_in_it(store: CheckpointStore, tmp_path: Path) -> None:
    """Nothing is called missing or lost because nobody answers."""
    store.put(checkpoint(tmp_path), NAME)

    def away(method: str, *args: Any) -> None:
        if method in ("cat_file", "find", "get_file"):
            raise TimeoutError("no answer")

    with pytest.raises(UnreadableError, match=r"is missing in memory://.*look at the service"):
        open_store("memory://elsewhere/mine").get(NAME, tmp_path / "back")
    away_store = troubled(store, away)
    for ask in (
        lambda: away_store.flaws([NAME]),
        lambda: away_store.get(NAME, tmp_path / "back"),
        away_store.names,
        lambda: away_store.has(SIGN),
    ):
        with pytest.raises(UnreadableError, match="TimeoutError: no answer"):
            ask()


def test_a_full_disk_here_is_not_blamed_on_the_store(store: CheckpointStore, tmp_path: Path) -> None:
    """The message names the folder of the copies."""
    store.put(checkpoint(tmp_path), NAME)

    def full(method: str, *args: Any) -> None:
        if method == "get_file":
            raise OSError(28, "No space left on device")

    patient = dataclasses.replace(troubled(store, full), patience=Patience(0.0))
    with pytest.raises(DiskError, match=r"The copy .*back cannot be written .*make room"):
        patient.get(NAME, tmp_path / "back")


# ------------------------------------------------------------------------- the places


def test_a_folder_and_a_url_are_told_apart(tmp_path: Path) -> None:
    """file:// is a folder; a run has its own place in either."""
    assert (Path("/mnt/x"), "") == (folder_of("file:///mnt/x"), url_of("file:///mnt/x"))
    assert (None, "s3://b/x") == (folder_of("s3://b/x"), url_of("s3://b/x"))
    assert (None, "") == (folder_of(None), url_of(None))
    places = {own_place("s3://b/x/", "run") for _ in range(2)}
    assert len(places) == 2 and all(place.startswith("s3://b/x/run-") for place in places)
    assert own_place(str(tmp_path), "run").startswith(f"{tmp_path}/run-")


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        ("s3://key:hunter2@bucket/x", "holds a password"),
        ("sftp://host/x?password=hunter2", "holds a password"),
        ("nope://bucket/x", "no package here knows nope"),
        ("simplecache::memory://x/y", "is no place"),
        ("memory://", "is no place"),
    ],
)
def test_a_bad_place_is_refused_before_anything_is_touched(shared: str, words: str) -> None:
    """The message says what is wrong with it, and never the password."""
    with pytest.raises(SettingsError, match=words) as refused:
        check_shared(shared)
    assert "hunter2" not in str(refused.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec says which package brings a protocol, and that it is needed on every machine."""
    import fsspec

    def missing(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(SettingsError, match=r"Install s3fs to access S3 \(on every machine\)"):
        check_shared("s3://bucket/x")


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_a_place_is_signed_found_again_and_left(kind: str, url: str, tmp_path: Path) -> None:
    """What was begun is found; without its sign nothing in it is called lost; what never began goes."""
    place = url if kind == "url" else str(tmp_path / "mnt" / "run-1")
    with pytest.raises(SettingsError, match=rf"{SIGN} is missing.*(mount the folder|look at the service)"):
        find_place(place)
    begin_place(place)
    find_place(place)
    leave_place(place)
    with pytest.raises(SettingsError, match="is missing"):
        find_place(place)
    assert kind == "url" or [] == list((tmp_path / "mnt").iterdir())


def test_leaving_removes_nothing_that_is_not_a_runs_own(tmp_path: Path) -> None:
    """A folder without the sign of a run stays as it is."""
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    leave_place(str(tmp_path))
    assert ["thesis.txt"] == os.listdir(tmp_path)


def test_a_place_that_cannot_be_written_is_a_wrong_setting(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"--shared .* cannot be written"):
        begin_place(str(tmp_path / "file" / "run"))


# ------------------------------------------------------------------------- the worker


class Bench:
    """A workshop that writes a checkpoint for each segment, and keeps what it found of the one before."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self.jobs = folder, [""][:0], 0

    def train(self, job: TrainJob) -> tuple[SegmentResult, ...]:
        self.jobs += 1
        results = []
        for s in job.segments:
            if s.checkpoint_in:
                self.found.append((self.folder / s.checkpoint_in / STATE_FILE).read_text(encoding="utf-8"))
            name = f"trial{s.trial_id:04d}-rung{s.rung}-tokens{s.stop_tokens}-attempt0"
            checkpoint(self.folder, name)
            results.append(
                SegmentResult(
                    *(s.trial_id, s.rung, "ok", s.stop_tokens),
                    loss=1.0,
                    seconds={"train": 1.0},
                    checkpoint_out=name,
                )
            )
        return tuple(results)

    def calibrate(self, job: CalibrateJob) -> Calibration:
        checkpoint(self.folder, "trial-001-tokens0")
        return Calibration("fp32", "ok", checkpoint_seconds=0.25, seconds={"checkpoint": 0.25})

    def score(self, job: ScoreJob) -> Score:
        self.found.append((self.folder / job.checkpoint / ADAPTER_FILE).read_text(encoding="utf-8"))
        return Score("ok", "fp32")

    def forget(self, quantization: str) -> None: ...

    def use(self) -> CardUse:
        return CardUse(0, 0)

    def close(self) -> None: ...

    def peak_bytes(self) -> int:
        return 0


@pytest.fixture
def courier(store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Courier]:
    """A worker with copies below a TMPDIR of its own; every look at its clock takes a second."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    copies = Copies.make()
    ticks = iter(range(10**6))
    courier = Courier(Bench(copies.folder), store, copies, clock=lambda: float(next(ticks)))
    yield courier
    courier.close()


def job(*segments: Segment) -> TrainJob:
    """A gang."""
    return TrainJob(1, segments, eval_examples=4, limit_seconds=60.0)


def bench(courier: Courier) -> Bench:
    """Its workshop."""
    assert isinstance(courier.workshop, Bench)
    return courier.workshop


def test_a_trial_goes_on_on_another_machine(courier: Courier, store: CheckpointStore, tmp_path: Path) -> None:
    """What one worker uploaded another one starts from; the ways are charged to load and checkpoint."""
    (first,) = courier.train(job(make_segment()))
    assert first.checkpoint_out is not None and {first.checkpoint_out} == store.names()
    assert {"train": 1.0, "load": 1.0, "checkpoint": 1.0} == first.seconds
    other = Courier(Bench(tmp_path / "there"), store, Copies(tmp_path / "there", os.open(tmp_path, 0)))
    (tmp_path / "there").mkdir()
    (second,) = other.train(job(make_segment(1500, 3000, checkpoint_in=first.checkpoint_out)))
    assert [f"{first.checkpoint_out}/{STATE_FILE}"] == bench(other).found
    assert (second.status, 2) == ("ok", len(store.names()))


def test_a_copy_that_is_whole_is_not_fetched_again_and_a_damaged_one_is(
    courier: Courier, store: CheckpointStore
) -> None:
    """The next segment of a trial on the same worker needs no download, unless its copy has suffered."""
    (first,) = courier.train(job(make_segment()))
    name, downloads = str(first.checkpoint_out), [""][:0]
    courier.store = troubled(
        store, lambda method, *args: downloads.append(args[0]) if method == "get_file" else None
    )
    courier.train(job(make_segment(1500, 2000, checkpoint_in=name)))
    assert [] == downloads
    (courier.copies.folder / name / STATE_FILE).write_text("rot", encoding="utf-8")
    courier.train(job(make_segment(1500, 2500, checkpoint_in=name)))
    assert 4 == len(downloads) and [f"{name}/{STATE_FILE}"] * 2 == bench(courier).found


def test_a_lost_checkpoint_does_not_keep_the_rest_of_the_gang_from_training(courier: Courier) -> None:
    """Its segment is lost, its neighbour trains; a gang of lost ones is not started."""
    gone = make_segment(1500, 3000, checkpoint_in=NAME)
    results = courier.train(job(gone, make_segment(trial_id=4)))
    assert [("lost", 1500), ("ok", 1500)] == [(r.status, r.tokens) for r in results]
    assert "never ended" in results[0].detail
    assert 1 == results[1].began  # so nobody takes it for memory that ran out
    courier.train(job(gone))
    assert 1 == bench(courier).jobs


def test_an_upload_that_fails_is_no_loss_of_the_trial(courier: Courier, store: CheckpointStore) -> None:
    """The segment counts as never run, with the reason where that of a full disk would stand."""

    def refuse(method: str, *args: Any) -> None:
        if method == "put_file" and "trial0003" in args[1]:
            raise PermissionError("Forbidden")

    courier.store = troubled(store, refuse)
    bad, good = courier.train(job(make_segment(), make_segment(trial_id=4)))
    assert ("unwritten", 0, None, None) == (bad.status, bad.tokens, bad.loss, bad.checkpoint_out)
    assert "PermissionError: Forbidden" in bad.detail and "ok" == good.status
    assert not list(courier.copies.folder.glob("trial0003*"))


def test_a_store_that_cannot_be_reached_leaves_the_segment_unread(
    courier: Courier, store: CheckpointStore
) -> None:
    """Nothing is called lost: as on a disk, it is tried again, and then the trial rests."""

    def away(method: str, *args: Any) -> None:
        if method == "cat_file":
            raise PermissionError("no answer")

    courier.store = troubled(store, away)
    (result,) = courier.train(job(make_segment(1500, 3000, checkpoint_in=NAME)))
    assert ("unread", 1500) == (result.status, result.tokens)
    assert "no answer" in result.detail


def test_a_folder_that_is_not_mounted_is_no_loss(tmp_path: Path) -> None:
    """Only there nothing is trained; the message names the machine. With the sign of the run it is."""
    mounted = Mounted(Bench(tmp_path), tmp_path)
    fresh, waiting = mounted.train(job(make_segment(), make_segment(9, 10, checkpoint_in=NAME)))
    assert ("unwritten", "unread") == (fresh.status, waiting.status)
    assert fresh.detail == waiting.detail and "mount the folder on this machine" in waiting.detail
    with pytest.raises(DiskError, match="mount the folder"):
        mounted.calibrate(CalibrateJob(1, "fp32", (4,), 4, 60.0))
    with pytest.raises(DiskError, match="mount the folder"):
        mounted.score(ScoreJob(1, "fp32", NAME, 4, 0, 4, 60.0))
    (tmp_path / SIGN).touch()
    assert ["ok"] == [result.status for result in mounted.train(job(make_segment()))]


def test_the_ways_are_part_of_what_a_checkpoint_costs(courier: Courier, store: CheckpointStore) -> None:
    """The calibration times a checkpoint there and back, and leaves none behind."""
    result = courier.calibrate(CalibrateJob(1, "fp32", (4,), 4, 60.0))
    assert (1.25, {"checkpoint": 1.25}) == (result.checkpoint_seconds, result.seconds)
    assert (set(), []) == (store.names(), os.listdir(courier.copies.folder))


def test_the_adapter_that_is_scored_is_fetched(
    courier: Courier, store: CheckpointStore, tmp_path: Path
) -> None:
    """Whoever scores need not have trained it."""
    store.put(checkpoint(tmp_path), NAME)
    courier.score(ScoreJob(1, "fp32", NAME, 4, 0, 4, 60.0))
    assert [f"{NAME}/{ADAPTER_FILE}"] == bench(courier).found


def test_copies_are_bounded_and_the_longest_unused_goes_first(courier: Courier, tmp_path: Path) -> None:
    """Never one that the job at hand needs."""
    names = [f"trial{number:04d}" for number in range(3)]
    for age, name in enumerate(names):
        os.utime(checkpoint(courier.copies.folder, name), (age, age))
    size = sum(len(data) for data in content(courier.copies.folder / names[0]).values())
    courier.copies.limit_bytes = 2 * size
    courier.copies.trim({names[0]})
    assert {names[0], names[2]} == set(os.listdir(courier.copies.folder))


def test_the_copies_of_killed_workers_go_and_those_of_living_ones_stay(courier: Courier) -> None:
    """A lock tells them apart; a folder without one is nobody's to remove."""
    base = courier.copies.folder.parent.parent
    for name in ("0123dead", "strange"):
        (base / f"{PREFIX}{name}").mkdir()
    (base / f"{PREFIX}0123dead" / LOCK).touch()
    Copies.make().close()
    assert {courier.copies.folder.parent.name, f"{PREFIX}strange"} == set(os.listdir(base))


@pytest.mark.slow
def test_a_worker_process_trains_on_copies(setup: WorkerSetup, tmp_path: Path) -> None:
    """The real worker uploads, goes on from what is in the store, and leaves nothing below TMPDIR."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    remote = dataclasses.replace(
        setup, checkpoint_path=str(tmp_path / "elsewhere"), shared="memory://there/mine"
    )
    engine = LocalEngine(remote, tmp_path / "worker.log", environment={"TMPDIR": str(scratch)})

    def result_of(segment: Segment) -> SegmentResult:
        engine.submit(job(segment))
        while True:
            for report in engine.poll(1.0):
                if isinstance(report, JobEnded):
                    (result,) = report.results
                    assert isinstance(result, SegmentResult)
                    return result

    try:
        first = result_of(make_segment(0, 600))
        assert first.status == "ok", first.detail
        (copies,) = scratch.glob(f"{PREFIX}*/checkpoints")
        shutil.rmtree(copies / str(first.checkpoint_out))
        second = result_of(make_segment(first.tokens, 1200, checkpoint_in=first.checkpoint_out))
        assert (second.status, second.tokens > first.tokens) == ("ok", True), second.detail
        gone = result_of(make_segment(600, 1200, checkpoint_in=NAME))
        assert "unread" == gone.status and SIGN in gone.detail  # nobody signed
    finally:
        engine.close()
    assert [] == list(scratch.glob(f"{PREFIX}*")) and not (tmp_path / "elsewhere").exists()


# ------------------------------------------------------------------------- the driver


@dataclasses.dataclass
class House:
    """A run whose checkpoints are behind a URL."""

    root: Path
    story: Story
    store: CheckpointStore

    @property
    def inner(self) -> AdapterExporter:
        return AdapterExporter(
            self.root / "run", self.copies, MODEL, FACTS["data"], self.root / "model", owner="mine"
        )

    @property
    def exporter(self) -> SharedExporter:
        return SharedExporter(**vars(self.inner), store=self.store)

    @property
    def copies(self) -> Path:
        return self.root / "run" / "checkpoints"

    @property
    def best(self) -> Any:
        return self.story.history.incumbent


@pytest.fixture
def house(store: CheckpointStore, tmp_path: Path) -> House:
    """A whole run; all checkpoints that it ever wrote are still there."""
    story = whole_run()
    (tmp_path / "model").mkdir()
    (tmp_path / "run").mkdir()
    claim(tmp_path / "run" / "checkpoints", "mine")
    for _, result in story.history.results:
        if result.checkpoint_out:
            store.put(checkpoint(tmp_path / "workers", result.checkpoint_out), result.checkpoint_out)
    return House(tmp_path, story, store)


def test_the_adapter_is_made_from_what_is_in_the_store(house: House) -> None:
    """Of the best checkpoint only what an adapter needs is copied; a second export asks for nothing."""
    house.exporter.export(house.story.history, house.best, final=True)
    assert house.exporter.stands(house.best.best_checkpoint) and "" == house.exporter.damage(house.best)
    assert STATE_FILE not in content(house.copies / house.best.best_checkpoint)

    def away(method: str, *args: Any) -> None:
        raise TimeoutError("no answer")

    house.store = troubled(house.store, away)
    house.exporter.export(house.story.history, house.best, final=True)


def test_a_best_checkpoint_that_is_gone_is_recorded_as_lost(house: House) -> None:
    """As on one machine; but not while the store cannot be reached."""
    name, said = house.best.best_checkpoint, [""][:0]
    away = troubled(house.store, lambda method, *args: (_ for _ in ()).throw(PermissionError("no answer")))
    incumbent = Incumbent(
        dataclasses.replace(house.exporter, store=away), lambda event: None, lambda: house.story.history
    )
    incumbent.look_round()
    assert incumbent.best() is None
    with pytest.raises(UnreadableError, match="no answer"):
        incumbent.export(final=True)
    house.store.remove(name)
    incumbent = Incumbent(
        house.exporter, lambda event: said.append(type(event).__name__), lambda: house.story.history
    )
    incumbent.look_round()
    assert ["CheckpointLost"] == said
    assert "never ended" in house.exporter.damage(house.best)


def test_the_sweep_leaves_the_best_one_there_and_one_copy_here(house: House) -> None:
    """What nothing needs goes from the store, torn uploads and other runs' names told apart."""
    house.exporter.export(house.story.history, house.best, final=True)
    checkpoint(house.copies, "trial0000-rung0-tokens1-attempt7")
    house.store.write("trial0001-rung0-tokens1-attempt7/0123-file", b"half")
    house.store.write("notes/mine.txt", b"mine")
    house.exporter.sweep(house.story.history)
    assert {house.best.best_checkpoint, "notes"} == house.store.names()
    assert {house.best.best_checkpoint, SIGN} == set(os.listdir(house.copies))


def test_a_sweep_that_fails_ends_nothing(house: House, time: Time, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged without waiting; for a minute the store is left alone, then the next one tries again."""
    asked = [0]

    def away(method: str, *args: Any) -> None:
        asked[0] += method == "invalidate_cache"
        raise TimeoutError("no answer")

    exporter = dataclasses.replace(house.exporter, store=troubled(house.store, away), clock=time)
    for now, times in ((0.0, 1), (59.0, 1), (61.0, 2)):
        time.now = now
        exporter.sweep(house.story.history)
        assert times == asked[0]
    assert "no answer" in caplog.text and [] == time.waits


def test_a_damaged_adapter_is_mended_from_the_store(house: House) -> None:
    """As from a checkpoint on the disk."""
    house.exporter.export(house.story.history, house.best, final=True)
    shutil.rmtree(house.copies / house.best.best_checkpoint)
    (house.exporter.target / ADAPTER_FILE).write_text("rot", encoding="utf-8")
    lines: list[str] = []
    mend(house.exporter, house.story.history, lines.append, lambda: house.root / "model")
    assert house.exporter.stands(house.best.best_checkpoint) and 1 == len(lines)


def test_with_a_folder_there_is_nothing_between(house: House, tmp_path: Path) -> None:
    """Checkpoints are read where the workers wrote them; without --shared nothing changes."""
    inner = house.inner
    shared = exporter_for(inner, str(tmp_path / "workers"))
    assert not isinstance(shared, SharedExporter)
    assert {} == shared.missing([house.best.best_checkpoint])
    assert exporter_for(inner, None) is inner
    assert isinstance(exporter_for(inner, house.store.url), SharedExporter)


@pytest.mark.parametrize("shared", ["s3://bucket/runs/mine-1", "/mnt/everybody/mine-1"])
def test_a_manifest_does_not_say_whose_bucket_or_folder_it_was(shared: str, tmp_path: Path) -> None:
    """It is for others to read; for its trials it makes no difference."""
    shown = manifest._settings({"shared": shared}, tmp_path)
    assert {"s3:": "s3", "/mnt": "folder"}[shared[:4].removesuffix("/")] == shown["shared"]


def test_room_is_looked_for_where_the_checkpoints_lie(
    small_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the shared folder; behind a URL nobody knows how much fits, and the run folder holds little."""
    need = DiskNeed(checkpoint=1000, adapter=100, records=10, held=5, gang=1)
    free = {tmp_path / "run": 1000, tmp_path / "full": 3000, tmp_path / "large": 10**6}
    monkeypatch.setattr(room, "free_bytes", lambda path: free[path])

    def look(shared: str | None) -> int | None:
        return room.check_disks(shared, tmp_path / "run", need)

    assert (5, None) == (look(str(tmp_path / "large")), look("s3://bucket/x"))
    with pytest.raises(RunFolderError, match=r"--shared .*full: its disk"):
        look(str(tmp_path / "full"))
    with pytest.raises(RunFolderError, match=r"--out .*run: its disk"):
        look(None)


@pytest.fixture
def small_settings(rows_file: Path, tmp_path: Path) -> Settings:
    """Of any run."""
    return load_settings({"gpu": "cpu", "data": str(rows_file), "out": str(tmp_path / "run")}, cwd=tmp_path)


def test_a_run_is_not_resumed_while_its_checkpoints_are_not_mounted(
    small_settings: Settings, tmp_path: Path
) -> None:
    """Otherwise every checkpoint would be called lost: the ledger stays as it was, to the byte."""
    from budgetsearch import api

    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    settings = small_settings.model_copy(update={"shared": str(tmp_path / "mnt" / "run-1")})
    folder.prepare(settings.model_dump(mode="json"), "mine")
    ledger = Ledger(folder.ledger)
    ledger.append(Opened(720.0, settings.model_dump(mode="json"), {**FACTS, "study": "run"}), VirtualClock())
    ledger.close()
    before = len(read_history(folder.ledger).results), folder.ledger.stat().st_size
    with pytest.raises(SettingsError, match=r"is missing.*mount the folder"):
        api.resume(folder.path, model=settings.model, data=settings.data)
    assert before == (len(read_history(folder.ledger).results), folder.ledger.stat().st_size)


def test_the_doctor_asks_the_shared_place_and_writes_nothing_there(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is not there and a service that does not answer fail, with a remedy."""
    assert ["ok", "ok"] == [host.shared_place(place).state for place in (str(tmp_path), url)]
    assert [] == list(tmp_path.iterdir())
    missing = host.shared_place(str(tmp_path / "mnt"))
    assert ("fail", "Mount it") == (missing.state, missing.remedy[:8])

    def away(self: Any, key: str) -> bool:
        raise TimeoutError("no answer")

    monkeypatch.setattr(CheckpointStore, "_cat", away)
    silent = host.shared_place(url)
    assert ("fail", "Look at the network and at the service.") == (silent.state, silent.remedy)


def test_the_doctor_looks_for_room_where_the_checkpoints_lie(
    small_settings: Settings, tmp_path: Path
) -> None:
    """In the shared folder, if there is one; in the run folder otherwise."""
    facts, space = ModelFacts("a model"), load_space("lora_small")
    for shared, expected in ((None, "run"), (str(tmp_path / "mnt"), "mnt"), ("s3://bucket/x", "run")):
        settings = small_settings.model_copy(update={"shared": shared})
        assert expected == examine._run_place(settings, facts, space).path.name
