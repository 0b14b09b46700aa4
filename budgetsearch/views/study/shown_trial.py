"""What the study says of the run and of one trial: attributes, values by rung, constraints, states, times.

Pure functions of the history. optuna-dashboard prints user attributes in the order in which they came, and
only the first few without scrolling, so what people look for comes first, with its unit.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.plan import Plan
from budgetsearch.core.resources.memory import problem
from budgetsearch.core.space.space import Space
from budgetsearch.views.metric import metric_of, trial_metric
from budgetsearch.views.study.distributions import shown
from budgetsearch.views.words import rung_names, words_of

LOSS = "validation loss"
"""The name of the objective."""
CONSTRAINT = "memory"
LEGACY = "constraints"
"""The system attribute in which optuna-dashboard 0.21 looks for constraints; Optuna 5 names each."""
INFEASIBLE = 1.0
"""A constraint above 0 is not kept."""
WHY_CHARACTERS = 300
"""Of a failure's own words so many are shown."""

# ------------------------------------------------------------------------- the study


def study_attributes(history: History, plan: Plan) -> dict[str, Any]:
    """Explain the rungs and the losses, for people and for programs."""
    rungs: list[dict[str, Any]] = [
        {
            "rung": rung,
            "seconds": seconds,
            "tokens": {name: round(seconds * rate) for name, rate in plan.reference_rates.items()},
        }
        for rung, seconds in enumerate(plan.ladder)
    ]
    return {
        **{
            name: ", ".join(f"{tokens} tokens under {kind}" for kind, tokens in rung["tokens"].items())
            for name, rung in zip(rung_names(history), rungs, strict=True)
        },
        "intermediate values": "loss by rung; a rung's seconds are training alone",
        "loss": f"mean cross-entropy, in {words_of(history).exact}",
        "budget_seconds": plan.budget_seconds,
        "gpu": plan.gpu,
        "rungs": rungs,
    }


# ------------------------------------------------------------------------- one trial


def attributes(state: TrialState, history: History) -> dict[str, Any]:
    """Attributes that change while the run goes."""
    names = rung_names(history)
    losses = [f"{loss:.4f} at {names[rung]}" for rung, loss in values(state, history).items()]
    attrs: dict[str, Any] = {
        "status": history.standing(state),
        "loss by rung": ", ".join(losses) or "none yet",
        **_metric(state, history),
        "rung": state.rung,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 3),
        "peak_bytes": state.peak_bytes,
    }
    why = _why(state, history)
    return {**attrs, "why": why} if why else attrs


def _metric(state: TrialState, history: History) -> dict[str, Any]:
    """The mean of the run's metric at the best checkpoint, under its name."""
    metric, value = metric_of(history), trial_metric(state, history)
    return {} if metric is None or value is None else {metric.name: round(value, 6)}


def _why(state: TrialState, history: History) -> str | None:
    """Say why a trial is out, in the words of what ended it."""
    if not state.dead:
        return None
    details = [result.detail for _, result in history.results if result.trial_id == state.trial_id]
    told = next((detail for detail in reversed(details) if detail), None)
    if told is None and state.dead == "infeasible" and history.plan is not None:
        told = problem(history.plan, history.refused, state.trial.params)
    return told[:WHY_CHARACTERS] if told else None


def values(state: TrialState, history: History) -> dict[int, float]:
    """Loss by rung. A full run that ended before R has its best loss at the last rung."""
    assert history.plan is not None
    found = dict(state.losses)
    over = state.trial_id in history.full_done
    if over and state.full_losses:
        found.setdefault(history.plan.top_rung, min(state.full_losses))
    return {step: value for step, value in sorted(found.items()) if math.isfinite(value)}


def infeasible(state: TrialState) -> bool:
    """Tell whether the trial's constraint is broken: it fits into memory in no way."""
    return state.dead == "infeasible"


def winners(history: History) -> set[int]:
    """Trials that are told as complete: the full runs, or without any the exported one."""
    ran = {
        state.trial_id
        for state in history.trials.values()
        if state.full_losses and state.best_loss is not None and state.dead in (None, "timeout")
    }
    best = history.incumbent
    return ran or ({best.trial_id} if best is not None else set())


def is_over(history: History) -> bool:
    """Tell whether the run has come to its end."""
    return history.closed is not None and history.closed.state == "finished"


def is_settled(state: TrialState, history: History) -> bool:
    """Tell whether nothing that is said of a trial can change before the run is over, the best's end apart:
    it is dead, or its checkpoint was given up so that it cannot be promoted any more."""
    if state.running or state.trial_id in history.full_trials:
        return False
    if state.dead:
        return True
    scout = history.plan is not None and state.trial_id < history.plan.scouts and state.goal == 0
    return state.trial_id in history.dropped and not state.full_losses and not scout


def has_ended(state: TrialState, history: History) -> bool:
    """Tell whether Optuna's trial is over: with the run, or because it is out and is not the best so far."""
    return is_over(history) or (state is not history.incumbent and is_settled(state, history))


def end_of(state: TrialState, winning: set[int]) -> str:
    """Optuna's name for how a trial ended."""
    if state.trial_id in winning:
        return "COMPLETE"
    if state.dead and (state.dead != "timeout" or not state.losses):
        return "FAIL"
    return "PRUNED"


def whole_trial(state: TrialState, history: History) -> Any:
    """The trial as an Optuna trial with all that is known of it.

    Written at once, it is there with its real times, or not at all.
    """
    import optuna

    assert history.plan is not None
    trial = state.trial
    distributions = shown(Space.parse(history.plan.space), trial.params)
    ends = has_ended(state, history)
    how = end_of(state, winners(history)) if ends else "RUNNING"
    losses = values(state, history)
    found = optuna.trial.create_trial(
        state=optuna.trial.TrialState[how],
        value=value_of(how, state, losses),
        params={name: trial.params[name] for name in distributions},
        distributions=distributions,
        user_attrs={
            **attributes(state, history),
            "trial_id": trial.trial_id,
            "origin": trial.origin,
            "params": dict(trial.params),
            "rung_tokens": list(trial.rung_tokens),
        },
        system_attrs={LEGACY: [INFEASIBLE]} if infeasible(state) else {},
        constraints={CONSTRAINT: INFEASIBLE} if infeasible(state) else {},
        intermediate_values=losses,
    )
    found.datetime_start = _local(state.added_wall)
    if ends:
        found.datetime_complete = _local(state.ended_wall or state.added_wall)
    return found


def value_of(how: str, state: TrialState, losses: Mapping[int, float]) -> float | None:
    """As ``Study.tell`` decides it: a pruned trial's value is its last loss."""
    if how == "COMPLETE":
        return state.best_loss
    return losses[max(losses)] if how == "PRUNED" and losses else None


def _local(wall: float) -> datetime.datetime:
    """Optuna's times are local and know no zone."""
    return datetime.datetime.fromtimestamp(wall)
