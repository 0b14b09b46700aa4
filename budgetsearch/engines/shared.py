"""The worker's side of shared checkpoints: in a folder, or behind a URL with copies of them here.

Behind a URL the worker trains on copies in a folder of its own machine. What it uploaded stays there as a
copy, within bounds: the next segment of the same trial often comes to the same worker.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetsearch.core.errors import CheckpointError, DiskError, UnreadableError
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
from budgetsearch.core.results import untrained
from budgetsearch.storage.checkpoint_store import CheckpointStore, Patience, missing_sign
from budgetsearch.storage.ownership import SIGN, checkpoint_in
from budgetsearch.storage.shared import folder_of, open_store
from budgetsearch.training import sums

if TYPE_CHECKING:
    from budgetsearch.training.trainers import Trainer

COPIES_BYTES = 8 * 2**30
"""Copies beyond this are removed, the longest unused first; never those of the job at hand."""
PREFIX = "budgetsearch-copies-"
LOCK = "lock"
"""In a folder of copies: held as long as its worker lives."""


def with_shared(
    setup: WorkerSetup, build: Callable[[WorkerSetup], Trainer], stopping: Callable[[int], bool]
) -> Trainer | Guard:
    """What ``build`` makes of the setup; where several machines share checkpoints, with a guard before it.

    ``stopping(job_id)``: whether a job was cancelled; then the store is not asked again and again.

    Raises:
        SettingsError: no package here knows the URL's protocol.
        DiskError: there is no room for copies below TMPDIR.
    """
    if not setup.shared:
        return build(setup)
    if (folder := folder_of(setup.shared)) is not None:
        return Mounted(build(setup), folder)
    copies = Copies.make()
    workshop = build(replace(setup, checkpoint_path=str(copies.folder)))
    courier = Courier(workshop, open_store(setup.shared), copies)
    patience = Patience(hurried=lambda: stopping(courier.job_id))
    courier.store = replace(courier.store, patience=patience)
    return courier


@dataclass
class Copies:
    """Copies of checkpoints on this machine, for one process."""

    folder: Path
    lock: int
    """A file descriptor: as long as it is open, nobody takes the folder for a dead worker's."""
    limit_bytes: int = COPIES_BYTES

    @classmethod
    def make(cls, limit_bytes: int = COPIES_BYTES) -> Copies:
        """A fresh folder below TMPDIR; those of workers that were killed go.

        Raises:
            DiskError: it cannot be made.
        """
        base = Path(tempfile.gettempdir())
        for other in base.glob(f"{PREFIX}*"):
            _remove_if_dead(other)
        try:
            top = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            # Locked before it has its name: nobody ever sees a living worker's folder unlocked.
            lock = os.open(top / "lock.new", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(top / "lock.new", top / LOCK)
            (top / "checkpoints").mkdir()
        except OSError as error:
            raise DiskError(
                f"Copies of checkpoints cannot be kept in {base} ({error}); "
                "let TMPDIR name a folder with room."
            ) from error
        return cls(top / "checkpoints", lock, limit_bytes)

    def trim(self, needed: set[str]) -> None:
        """Remove copies beyond the limit, the longest unused first, but none that is needed."""
        ages = sorted((path.stat().st_mtime, path) for path in self.folder.iterdir() if path.is_dir())
        sizes = {path: sum(f.stat().st_size for f in path.iterdir()) for _, path in ages}
        total = sum(sizes.values())
        for _, path in ages:
            if total > self.limit_bytes and path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)
                total -= sizes[path]

    def drop(self, name: str) -> None:
        """Remove one copy, if it is there."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        os.close(self.lock)


@dataclass
class Guard:
    """A workshop behind something that concerns checkpoints alone; all else is the workshop's."""

    workshop: Trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.workshop, name)


@dataclass
class Mounted(Guard):
    """A workshop whose checkpoints lie in a folder that may not be mounted on this machine."""

    folder: Path

    def train(self, job: TrainJob) -> tuple[SegmentResult, ...]:
        """Train the segments; where the folder is missing nothing is trained, and nothing called lost."""
        if why := self._missing():
            return tuple(
                untrained(s, "unread" if s.checkpoint_in else "unwritten", why) for s in job.segments
            )
        return self.workshop.train(job)

    def calibrate(self, job: CalibrateJob) -> Calibration:
        """Measure one quantization.

        Raises:
            DiskError: the folder is not there.
        """
        if why := self._missing():
            raise DiskError(why)
        return self.workshop.calibrate(job)

    def score(self, job: ScoreJob) -> Score:
        """Score base and adapter.

        Raises:
            DiskError: the folder is not there.
        """
        if why := self._missing():
            raise DiskError(why)
        return self.workshop.score(job)

    def _missing(self) -> str:
        if (self.folder / SIGN).is_file():
            return ""
        return f"{missing_sign(str(self.folder))} It is {platform.node()}."


@dataclass
class Courier(Guard):
    """A workshop whose checkpoints come from a store and go there."""

    store: CheckpointStore
    copies: Copies
    clock: Callable[[], float] = time.monotonic
    job_id: int = 0
    """The job at hand."""

    def train(self, job: TrainJob) -> tuple[SegmentResult, ...]:
        """Fetch what the segments start from, train them, upload what came of them.

        A segment whose checkpoint is gone is lost and does not keep the others from training; one whose
        checkpoint cannot be fetched is unread, and one whose new checkpoint cannot be uploaded unwritten, as
        on a full disk.
        """
        self.job_id = job.job_id
        failed: dict[int, SegmentResult] = {}
        waited: dict[int, float] = {}
        for segment in job.segments:
            began = self.clock()
            try:
                if segment.checkpoint_in:
                    self._fetch(segment.checkpoint_in)
            except CheckpointError as error:
                failed[segment.trial_id] = untrained(segment, "lost", str(error))
            except UnreadableError as error:
                failed[segment.trial_id] = untrained(segment, "unread", str(error))
            except DiskError as error:
                failed[segment.trial_id] = untrained(segment, "unwritten", str(error))
            waited[segment.trial_id] = self.clock() - began
        ready = tuple(s for s in job.segments if s.trial_id not in failed)
        done = self.workshop.train(replace(job, segments=ready)) if ready else ()
        if failed:  # the workshop knows nothing of the others: not memory made the gang smaller
            done = tuple(replace(result, began=result.began or len(ready)) for result in done)
        found = {result.trial_id: result for result in done}
        results = []
        for segment in job.segments:
            result = failed.get(segment.trial_id) or self._deliver(segment, found[segment.trial_id])
            results.append(_charged(result, "load", waited[segment.trial_id]))
        self.copies.trim({r.checkpoint_out for r in results if r.checkpoint_out})
        return tuple(results)

    def calibrate(self, job: CalibrateJob) -> Calibration:
        """Measure one quantization; a checkpoint costs its way to the store and back as well."""
        self.job_id = job.job_id
        before = set(os.listdir(self.copies.folder))
        result = self.workshop.calibrate(job)
        for name in sorted(set(os.listdir(self.copies.folder)) - before):
            if result.status == "ok":
                began = self.clock()
                self.store.put(self.copies.folder / name, name)
                self.copies.drop(name)
                self.store.get(name, self.copies.folder / name)
                passed = self.clock() - began
                self.store.remove(name)
                seconds = {**result.seconds, "checkpoint": result.seconds.get("checkpoint", 0.0) + passed}
                result = replace(
                    result, checkpoint_seconds=result.checkpoint_seconds + passed, seconds=seconds
                )
            self.copies.drop(name)
        return result

    def score(self, job: ScoreJob) -> Score:
        """Fetch the adapter, then score it; an absolute path is the exported one, on the driver's machine."""
        self.job_id = job.job_id
        if not os.path.isabs(job.checkpoint):
            self._fetch(job.checkpoint)
        return self.workshop.score(job)

    def close(self) -> None:
        """Let go of the card, and of the copies."""
        self.workshop.close()
        self.copies.close()

    def _fetch(self, name: str) -> None:
        copy = checkpoint_in(self.copies.folder, name)
        if copy.exists():
            try:
                sums.check(copy)
            except (CheckpointError, UnreadableError):  # the copy's fault: what is in the store may be whole
                self.copies.drop(name)
            else:
                os.utime(copy)
                return
        self.store.get(name, copy)

    def _deliver(self, segment: Segment, result: SegmentResult) -> SegmentResult:
        name = result.checkpoint_out
        if name in (None, segment.checkpoint_in):
            return result
        began = self.clock()
        try:
            self.store.put(self.copies.folder / str(name), str(name))
        except DiskError as error:
            self.copies.drop(str(name))
            result = replace(
                result,
                status="unwritten",
                tokens=segment.start_tokens,
                loss=None,
                example_losses=(),
                checkpoint_out=None,
                detail=str(error),
            )
        return _charged(result, "checkpoint", self.clock() - began)


def _charged(result: SegmentResult, phase: str, seconds: float) -> SegmentResult:
    spent = {**result.seconds, phase: result.seconds.get(phase, 0.0) + seconds}
    return replace(result, seconds=spent)


def _remove_if_dead(folder: Path) -> None:
    """Remove the copies of a worker that was killed; those of a living one, or of somebody else, stay."""
    try:
        if not re.fullmatch(f"{PREFIX}[a-z0-9_]{{8}}", folder.name) or folder.is_symlink():
            return
        if not set(os.listdir(folder)) <= {LOCK, "checkpoints"}:
            return
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass
    finally:
        os.close(lock)
