"""The jobs around the search: calibrations before it, scores after it; and new trials with frozen rungs."""

from __future__ import annotations

import math
from dataclasses import replace

from budgetsearch.core.history.measured import Measured
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.plan import Plan, Trial
from budgetsearch.core.policy.metric_plan import LEAST_ANSWERS
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import CalibrateJob, Calibration, Score, ScoreJob
from budgetsearch.core.resources.memory import foresee, micro_batch

WARMUP_STEPS = 20
MAX_ANSWERS = 512
"""More of them would hardly make the accuracy surer, even where there is time."""
OPTIONAL_SHARE = 0.1
"""Of a calibration's limit: gangs are tried and answers timed only while this lasts, so that a slow machine
with a short budget still gets to train."""


def calibration_job(
    request: PlanRequest, quantization: str, job_id: int, limit_seconds: float
) -> CalibrateJob | Calibration:
    """The job that measures a quantization, or what is foreseen to come of it: it cannot be had, or nothing
    fits."""
    if quantization in request.refused:
        return Calibration(quantization, "refused", detail=request.refused[quantization])
    ahead = foresee(
        request.footprints.get(quantization),
        request.limit_bytes,
        request.ranks,
        request.batch_size,
        request.longest,
    )
    if ahead.refusal:
        return Calibration(quantization, "out_of_memory", detail=ahead.refusal)
    return CalibrateJob(
        job_id=job_id,
        quantization=quantization,
        ranks=ahead.ranks,
        batch_size=request.batch_size,
        limit_seconds=limit_seconds,
        micro_batches=ahead.micro_batches,
        dropout=request.dropout,
        limit_bytes=request.limit_bytes,
        max_gang=request.max_gang,
        probe_seconds=probe_seconds(request.budget_seconds),
        task_examples=request.task_examples or (LEAST_ANSWERS if request.metric else 0),
    )


def probe_seconds(budget_seconds: float) -> float:
    """Seconds of timing each size of gang in the calibration: one per mille of the budget, 1 to 20 s."""
    return max(1.0, min(20.0, 0.001 * budget_seconds))


def score_jobs(
    plan: Plan, best: TrialState, job_id: int, checkpoint: str = "", known: Score | None = None
) -> list[ScoreJob]:
    """The final scores of a trial's best checkpoint, still without their limits: the losses first; then, in a
    job of its own that may fail alone, answers while there is time, for nothing else can use it any more.

    ``checkpoint``: that folder, if it is not where the trial says. ``known``: what an earlier process
    measured of it; only what is missing is measured.
    """
    losses = ScoreJob(
        job_id=job_id,
        quantization=plan.cost_class(best.trial.params),
        checkpoint=checkpoint or str(best.best_checkpoint),
        eval_examples=plan.eval_examples,
        task_examples=0,
        micro_batch=best.micro_batch,
        limit_seconds=0.0,
    )
    answers = replace(
        losses,
        job_id=job_id + 1,
        eval_examples=0,
        task_examples=plan.task_examples,
        further=True,
    )
    wanted = [] if known and known.status == "ok" else [losses]
    if plan.task_examples and not (known and (known.task_examples or known.adapter_metric)):
        wanted.append(answers)
    return wanted


def new_trial(plan: Plan, trial_id: int, proposal: Proposal, measured: Measured | None = None) -> Trial:
    """Freeze a configuration's rungs in tokens: the ladder's seconds at its reference rate, in a free space
    at the pace that ``measured`` foresees; or, if its own full run is shorter or longer than the plan's, the
    same shares of that."""
    params = plan.knobs(proposal.params)
    batch = int(params.get("batch_size", plan.batch_size))
    tokens_of_step = plan.step_of(params)
    share = plan.token_share(plan.cost_class(params)) * plan.length_share(params)
    step = math.ceil(tokens_of_step if batch == plan.batch_size else tokens_of_step / plan.batch_size * batch)
    longest = proposal.max_tokens or int(plan.max_tokens * share)
    if "epochs" in params and plan.epoch_tokens:
        longest = min(longest, max(step, int(float(params["epochs"]) * plan.epoch_tokens * share)))
    if proposal.max_tokens:
        tokens = [round(longest * seconds / plan.full_seconds) for seconds in plan.ladder]
    else:
        rate = plan.reference_rates[plan.cost_class(proposal.params)]
        rate /= measured.pace(proposal.params) if measured else 1.0
        tokens = [min(round(seconds * rate), longest) for seconds in plan.ladder]
    rungs = tuple(max(step, some) for some in tokens)
    return Trial(
        trial_id=trial_id,
        params=dict(proposal.params),
        seed=plan.seed + trial_id,
        rung_tokens=rungs,
        warmup_tokens=min(int(params.get("warmup_steps", WARMUP_STEPS)) * step, rungs[0] // 3),
        batch_size=batch,
        micro_batch=micro_batch(plan, proposal.params),
        max_tokens=longest,
        origin=proposal.origin,
        entry=max(0, min(proposal.entry, plan.top_rung - 1)),
    )
