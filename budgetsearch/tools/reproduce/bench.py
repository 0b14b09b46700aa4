"""A worker outside of a run, for one job after the other, in a folder that is gone afterwards."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from budgetsearch.core.bases import DIMENSION, ModelSetup, cost_class
from budgetsearch.core.errors import EngineError
from budgetsearch.core.ports import Engine, Say
from budgetsearch.core.records import Job, Score, ScoreJob, SegmentResult, TrainJob
from budgetsearch.core.reports import Beat, JobEnded
from budgetsearch.run.manifest_schema import Manifest, Scores
from budgetsearch.run.prepare import Prepared, worker_setup
from budgetsearch.run.winner import targets_of_base
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.reproduce.inputs import Inputs

TALK_SECONDS = 10.0
"""A line on how it goes at most so often."""
NO_LIMIT = 30 * 86400.0
"""Seconds: nobody waits for a deadline here."""


@dataclass
class Bench:
    """A worker with the manifest's base and data; started with as many threads as the run had."""

    manifest: Manifest
    inputs: Inputs
    folder: RunFolder
    say: Say
    _engine: Engine | None = None
    _threads: str | None = None
    _jobs: int = 0

    def train(self, job: TrainJob, threads: str | None, hear: Callable[[Beat], None]) -> SegmentResult:
        """Train one job; returns what became of the winner in it.

        Raises:
            EngineError: it did not train.
        """
        trial = self.manifest.adapter.trial_id
        for result in self._perform(replace(job, job_id=self._next()), threads, hear):
            if isinstance(result, SegmentResult) and result.trial_id == trial:
                if result.status not in ("ok", "cancelled"):
                    raise EngineError(f"Training ended as {result.status}: {result.detail}")
                return result
        raise EngineError("The worker gave no result for the winner.")

    def score(self, checkpoint: str, scores: Scores) -> Score:
        """The losses, then as many answers as there were.

        Raises:
            EngineError: they could not be measured.
        """
        count = len(scores.adapter_example_losses)
        base = cost_class(self.manifest.adapter.params)
        job = ScoreJob(self._next(), base, checkpoint, count, 0, scores.micro_batch, NO_LIMIT)
        found = self._score(job, scores)
        if scores.task_examples:
            answers = replace(job, job_id=self._next(), eval_examples=0, task_examples=scores.task_examples)
            found = found.joined(self._score(answers, scores))
        return found

    def _score(self, job: ScoreJob, scores: Scores) -> Score:
        what = "answers" if job.task_examples else "losses"
        self.say(f"scoring base and adapter: {job.eval_examples or job.task_examples} {what}")
        (score,) = self._perform(job, scores.computed_on.get("threads"), lambda beat: None)
        assert isinstance(score, Score)
        if score.status != "ok":
            raise EngineError(f"The adapter could not be scored: {score.detail}")
        return score

    def close(self) -> None:
        """End the worker; safe to call twice."""
        if self._engine is not None:
            self._engine.close()

    def _next(self) -> int:
        self._jobs += 1
        return self._jobs

    def _perform(self, job: Job, threads: str | None, hear: Callable[[Beat], None]) -> tuple[object, ...]:
        engine = self._started(threads)
        engine.submit(job)
        while True:
            for report in engine.poll(1.0):
                if isinstance(report, Beat):
                    hear(report)
                elif isinstance(report, JobEnded) and report.job_id == job.job_id:
                    return report.results

    def _started(self, threads: str | None) -> Engine:
        """The worker; another one if the run had another number of threads by then."""
        from budgetsearch.engines.local import LocalEngine
        from budgetsearch.machine.detect import detect

        if self._engine is not None and threads == self._threads:
            return self._engine
        self.close()
        inputs = self.inputs
        assert inputs.settings is not None and inputs.base is not None and inputs.prepared is not None
        card = detect("cpu" if self.manifest.card.get("device") == "cpu" else "auto")
        if card.note and self._engine is None:
            self.say(card.note)
        environment = dict(card.environment)
        if threads:
            environment["OMP_NUM_THREADS"] = threads
        setup = worker_setup(Prepared(inputs.settings, card, inputs.base, inputs.prepared), self.folder)
        setup = replace(setup, worn=targets_of_base({"base": {"anatomy": self.manifest.base.anatomy}}))
        if (left_out := self.manifest.data.left_out) is not None:
            label = str(self.manifest.adapter.params[DIMENSION])
            paths = setup.model_path, setup.model_name, setup.data_path
            setup = replace(setup, models=(ModelSetup(label, *paths, left_out),))
        self._engine = LocalEngine(setup, self.folder.worker_log, environment=environment)
        self._threads = threads
        return self._engine


@contextmanager
def bench(manifest: Manifest, inputs: Inputs, say: Say) -> Iterator[Bench]:
    """A worker and a folder for its checkpoints; both are gone afterwards, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="budgetsearch-") as scratch:
        folder = RunFolder(Path(scratch))
        folder.checkpoints.mkdir()
        made = Bench(manifest, inputs, folder, say)
        try:
            yield made
        finally:
            made.close()


@dataclass
class Talk:
    """Says how far a training is, and how long it may still take."""

    say: Say
    total_seconds: float
    """What the run needed for all of it."""
    done_seconds: float = 0.0
    """... and for what is over."""
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._began = self._last = self.now()

    def hear(self, beat: Beat, label: str, seconds: float, share: float) -> None:
        """A sign of life from a link that took the run ``seconds`` and of which ``share`` is over."""
        now = self.now()
        if now - self._last < TALK_SECONDS:
            return
        self._last = now
        loss = "" if beat.loss is None else f", training loss {beat.loss:.4f}"
        self.say(f"{label}{loss}, about {self.left(now, seconds * share):.0f} s left")

    def left(self, now: float, inside: float) -> float:
        """Seconds that are left, at the pace so far; before there is one, at the run's."""
        over = self.done_seconds + inside
        pace = (now - self._began) / over if over > 0 else 1.0
        return max(0.0, self.total_seconds - over) * pace
