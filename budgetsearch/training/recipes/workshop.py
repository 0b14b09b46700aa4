"""Carries out the jobs of a worker with a recipe, one trial after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import CheckpointError, UnreadableError
from budgetsearch.core.landing import Pilot
from budgetsearch.core.metric import Values
from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Probe,
    Schedule,
    Score,
    ScoreJob,
    Segment,
    SegmentResult,
    Status,
    TrainJob,
    WorkerSetup,
)
from budgetsearch.core.reports import Beat, Notice
from budgetsearch.core.results import untrained
from budgetsearch.storage.ownership import PROBE_TRIAL, checkpoint_in
from budgetsearch.training import memory
from budgetsearch.training.bench import Bench
from budgetsearch.training.machine import computed_on
from budgetsearch.training.recipes import folders
from budgetsearch.training.recipes.folders import Kept
from budgetsearch.training.recipes.protocol import Course, Recipe
from budgetsearch.training.recipes.running import Run, losses_of, mean
from budgetsearch.training.timer import Timer

TRUNK = Schedule(warmup_tokens=0, stop_tokens=0)
"""A constant rate."""


class RecipeWorkshop(Bench):
    """Trains trials of a recipe; a token is a unit of the recipe's here."""

    def __init__(
        self,
        recipe: Recipe,
        setup: WorkerSetup,
        send: Callable[[Beat | Notice], None],
        stopping: Callable[[int], bool],
    ) -> None:
        """``send`` takes heartbeats and notices; ``stopping(job_id)``: whether a job was cancelled."""
        super().__init__(setup, send, stopping)
        assert setup.recipe is not None
        self._params, self._checkpoints = setup.recipe.params, Path(setup.checkpoint_path)
        self.recipe = recipe
        self.recipe.setup(setup.device)

    def train(self, job: TrainJob) -> tuple[SegmentResult, ...]:
        """Train the job's segments, one after the other."""
        self._begin(job)
        return tuple(self._segment(segment) for segment in job.segments)

    def calibrate(self, job: CalibrateJob) -> Calibration:
        """Measure one class of costs at the likeliest configuration."""
        self._begin(job)
        params = {**self._params}
        if "quantization" in params:
            params["quantization"] = job.quantization
        self._check_fits(params)
        clock = Timer()
        trial = self.recipe.start(params, self.setup.seed)
        load = clock.lap("load")
        run = Run(self.recipe, trial, 0, Course(lambda: TRUNK, lambda: False, lambda *_: None))
        most = self.recipe.length or math.inf
        rate = run.rate(most, job.probe_seconds, lambda: self._beat(None, "calibrate", run.units, None))
        clock.lap("train")
        losses_of(self.recipe.evaluate(trial))
        self._second(trial)  # the reserve is made of this, and the final scores have both
        evaluate = clock.lap("evaluate")
        name = f"trial{PROBE_TRIAL}-rung0-tokens{run.units}-attempt0"
        folders.write(self._checkpoints / name, self.recipe, Kept(trial, run.units, params, self.setup.seed))
        write = clock.lap("checkpoint")
        peak = self.peak_bytes()
        return Calibration(
            quantization=job.quantization,
            status="ok",
            tokens_per_second=rate,
            eval_seconds_per_example=max(1e-6, evaluate),
            checkpoint_seconds=write,
            load_seconds=load,
            probes=(Probe(1, 1, False, 1, rate, peak),),
            peak_bytes=peak,
            seconds=dict(clock.seconds),
        )

    def score(self, job: ScoreJob) -> Score:
        """Evaluate the best trial once more, and one of the same configuration that was never trained."""
        self._begin(job)
        clock = Timer()
        folder = Path(job.checkpoint)
        if not folder.is_absolute():
            folder = checkpoint_in(self._checkpoints, job.checkpoint)
        kept = folders.read(folder, self.recipe)
        untouched = self.recipe.start(kept.params, kept.seed)
        trained = losses_of(self.recipe.evaluate(kept.trial))
        fresh = losses_of(self.recipe.evaluate(untouched))
        tuned = self._second(kept.trial)
        plain = self._second(untouched) if tuned else ()
        paired = len(plain) == len(tuned)
        clock.lap("score")
        known = math.isfinite(mean(fresh))  # of nothing trained there may be no number
        return Score(
            status="ok",
            quantization=job.quantization,
            base_loss=mean(fresh) if known else None,
            adapter_loss=mean(trained),
            base_example_losses=fresh if known else (),
            adapter_example_losses=trained,
            example_tokens=(1,) * len(trained),
            base_metric=plain if paired else (),
            adapter_metric=tuned if paired else (),
            seconds=dict(clock.seconds),
            computed_on=computed_on(self.setup.device),
        )

    def _second(self, trial: Any) -> Values:
        """The recipe's further numbers; none where it has none, or fails."""
        if self.recipe.second_metric is None:
            return ()
        try:
            found = losses_of(self.recipe.second(trial), "second")
        except Exception as error:  # it is shown and decides nothing
            self._notice(f"the second metric failed: {type(error).__name__}: {error}"[:300])
            return ()
        return tuple(value if math.isfinite(value) else None for value in found)

    def forget(self, quantization: str) -> None:
        """After an error: give back memory that nobody holds."""
        memory.free(self.setup.device)

    def peak_bytes(self) -> int:
        """Peak memory of this process since the job began."""
        return self._meter.job()

    # ----------------------------------------------------------------------- a segment

    def _segment(self, segment: Segment) -> SegmentResult:
        clock = Timer()
        try:
            kept = self._opened(segment)
        except CheckpointError as error:
            return untrained(segment, "lost", str(error))
        except UnreadableError as error:
            return untrained(segment, "unread", str(error))
        clock.lap("load")
        pilot, told = Pilot(segment), [math.nan]
        course = Course(lambda: pilot.schedule, self._cancelled, self._teller(segment.trial_id, told))
        run = Run(self.recipe, kept.trial, kept.units, course)
        status, detail = self._train(run, pilot, segment)
        clock.lap("train")
        losses: tuple[float, ...] = ()
        if status == "ok" and segment.evaluate:
            losses = losses_of(self.recipe.evaluate(kept.trial))
            if not math.isfinite(mean(losses)):
                status, detail, losses = "diverged", f"{self.recipe.metric} {mean(losses)}", ()
        clock.lap("evaluate")
        name: str | None = segment.checkpoint_in
        if run.units > segment.start_tokens and status in ("ok", "cancelled"):
            status, detail, name = self._saved(segment, kept.trial, run.units, status, detail)
        clock.lap("checkpoint")
        held = name is not None and status != "diverged"
        return SegmentResult(
            trial_id=segment.trial_id,
            rung=segment.rung,
            status=status,
            tokens=run.units if held else segment.start_tokens,
            loss=mean(losses) if losses and status == "ok" else None,
            example_losses=losses if status == "ok" and len(losses) > 1 else (),
            train_loss=told[0] if math.isfinite(told[0]) else None,
            steps=run.pieces,
            seconds=dict(clock.seconds),
            peak_bytes=self.peak_bytes(),
            checkpoint_out=name if held else None,
            detail=detail,
            revisions=tuple(pilot.revisions),
            computed_on=computed_on(self.setup.device),
        )

    def _opened(self, segment: Segment) -> Kept:
        """A fresh trial, or one that goes on where its checkpoint stopped."""
        if segment.checkpoint_in:
            folder = checkpoint_in(self._checkpoints, segment.checkpoint_in)
            return folders.read(folder, self.recipe)
        self._check_fits(segment.params)
        return Kept(self.recipe.start(segment.params, segment.seed), 0, segment.params, segment.seed)

    def _train(self, run: Run, pilot: Pilot, segment: Segment) -> tuple[Status, str]:
        """Piece by piece to the end that the pilot allows."""
        pilot.begin(run.units, self._elapsed())
        try:
            while run.units < pilot.stop:
                if self._cancelled():
                    return "cancelled", ""
                run.piece(pilot.stop) if not self.recipe.whole else run.go(pilot.stop)
                self._beat(segment.trial_id, "train", run.units, None)
                change = pilot.look(run.units, self._elapsed())
                if change and (told := pilot.news(change, self.recipe.unit)):
                    self._notice(told)
        except FloatingPointError as error:
            return "diverged", str(error) or "a number is not finite any more"
        return "ok", ""

    def _saved(
        self, segment: Segment, trial: Any, units: int, status: Status, detail: str
    ) -> tuple[Status, str, str | None]:
        name = f"trial{segment.trial_id:04d}-rung{segment.rung}-tokens{units}-attempt{segment.attempt}"
        kept = Kept(trial, units, segment.params, segment.seed)
        try:
            folders.write(self._checkpoints / name, self.recipe, kept, export=segment.evaluate)
        except OSError as error:
            return "unwritten", str(error), None
        return status, detail, name

    def _check_fits(self, params: Any) -> None:
        """Raises MemoryError: the recipe says that it needs more than there is."""
        need, limit = self.recipe.memory(params), self.setup.limit_bytes
        if limit and need > limit:
            raise MemoryError(f"the recipe foresees {need} bytes, and {limit} are there")

    # ------------------------------------------------------------------------- telling

    def _teller(self, trial_id: int, told: list[float]) -> Callable[[int, float | None], None]:
        def tell(units: int, loss: float | None) -> None:
            told[0] = math.nan if loss is None else float(loss)
            self._beat(trial_id, "train", units, None if loss is None else float(loss))

        return tell
