"""Measuring real steps outside of a run, for ``budgetsearch plan --probe``."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from budgetsearch.core.policy.jobs import OPTIONAL_SHARE, calibration_job
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.ports import Engine, Say
from budgetsearch.core.records import CalibrateJob, Calibration
from budgetsearch.core.reports import JobEnded
from budgetsearch.machine.detect import detect
from budgetsearch.run.preflight import resolve
from budgetsearch.run.prepare import Prepared, Subject, prepare_inputs
from budgetsearch.run.recipes import PreparedRecipe
from budgetsearch.storage.runfolder import RunFolder

if TYPE_CHECKING:
    from budgetsearch.run.settings import Settings

PROBE_SECONDS = 60.0
"""What `plan --probe` may take for its probes, loading aside."""


def probe_here(settings: Settings, say: Say) -> tuple[PlanRequest, dict[str, Calibration]]:
    """Load the base model and measure real steps of each quantization, for a minute in all if that suffices;
    everything that was written is gone afterwards.

    Raises:
        UsageError: the model, the data or the card cannot be used.
    """
    from budgetsearch.engines.local import LocalEngine

    run = resolve(settings)
    settings = settings.model_copy(update={"shared": None})  # what is measured here is nobody's checkpoint
    card = run.card or detect(settings.gpu, settings.device)
    with tempfile.TemporaryDirectory(prefix="budgetsearch-probe-") as scratch:
        folder = RunFolder(Path(scratch))
        folder.checkpoints.mkdir()
        engine = LocalEngine(None, folder.worker_log, environment=card.environment)
        try:
            engine.warm_up()
            prepared: Subject
            if settings.recipe is not None:
                prepared = PreparedRecipe.of(settings, card, run.space)
            else:
                inputs = prepare_inputs(settings, say, None, run.space)
                prepared = Prepared(settings, card, *inputs, run.space)
            engine.prepare(prepared.setup(folder))
            request = prepared.request(run.space, settings.hours * 3600)
            return request, measure(engine, request, run.space.cost_classes, PROBE_SECONDS, say)
        finally:
            engine.close()


def measure(
    engine: Engine, request: PlanRequest, quantizations: Sequence[str], seconds: float, say: Say
) -> dict[str, Calibration]:
    """Calibrate each quantization outside of a run; what is optional in it stops after its share of the
    seconds."""
    found = {}
    for number, name in enumerate(quantizations):
        job = calibration_job(request, name, number, seconds / len(quantizations) / OPTIONAL_SHARE)
        if isinstance(job, Calibration):
            found[name] = job
            continue
        say(f"measuring {name}")
        engine.submit(job)
        found[name] = _answer(engine, job)
    return found


def _answer(engine: Engine, job: CalibrateJob) -> Calibration:
    """The result of a job, or that it was too slow: then it is ended."""
    until = time.monotonic() + job.limit_seconds
    ended = False
    while True:
        for report in engine.poll(1.0):
            if isinstance(report, JobEnded):
                result = report.results[0]
                assert isinstance(result, Calibration)
                late = f"took more than {job.limit_seconds:.0f} s"
                return dataclasses.replace(result, status="timeout", detail=late) if ended else result
        if time.monotonic() > until and not ended:
            engine.kill(job.job_id)
            ended = True
