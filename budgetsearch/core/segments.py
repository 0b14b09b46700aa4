"""The next segment of a trial: from where it stands to where it shall stop."""

from __future__ import annotations

from budgetsearch.core.decisions import Run
from budgetsearch.core.records import Schedule, Segment, cost_class
from budgetsearch.core.trial_state import TrialState
from budgetsearch.core.view import View

LIMIT_FACTOR = 4.0
"""The watchdog stops a rung's segment that takes so many times its expected seconds."""
LIMIT_SECONDS = 30.0
"""... plus this, for the segments of a few seconds."""


def segment_to(view: View, state: TrialState, rung: int, stop: int, schedule: Schedule) -> Segment:
    """To a token count, from the checkpoint that the trial has."""
    return Segment(
        trial_id=state.trial_id,
        params=state.trial.params,
        seed=state.trial.seed,
        rung=rung,
        start_tokens=state.tokens,
        stop_tokens=max(stop, state.tokens),  # a stopped one may have come further without an evaluation
        schedule=schedule,
        batch_size=state.trial.batch_size,
        micro_batch=state.micro_batch,
        checkpoint_in=state.checkpoint,
        attempt=state.crashes + state.lost + state.moves,
        recompute=view.plan.recompute.get(cost_class(state.trial.params), False),
    )


def rung_segment(view: View, state: TrialState, rung: int, reason: str, room: float = 0.0) -> Run | None:
    """To the end of a rung, if that surely fits with ``room`` further seconds before the reserve."""
    goal = state.trial.rung_tokens[rung]
    tokens = max(1, goal - state.tokens)
    if not view.fits(state, tokens, room):
        return None
    schedule = Schedule(warmup_tokens=state.trial.warmup_tokens, stop_tokens=goal)
    expected = view.costs.segment_seconds(state.trial.params, tokens)
    limit = LIMIT_FACTOR * expected + LIMIT_SECONDS
    return view.run(segment_to(view, state, rung, goal, schedule), reason, limit)
