"""What becomes of a person's wish in a run that goes: events, or a reason why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from budgetsearch.core.errors import SpaceError
from budgetsearch.core.events import Asked, Event, Noticed, TrialAdded
from budgetsearch.core.history.history import History
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.jobs import new_trial
from budgetsearch.core.ports import Proposal, Sampler
from budgetsearch.core.records import Params
from budgetsearch.core.space.space import Space
from budgetsearch.core.wishes import HAND, Wish, read_guess
from budgetsearch.storage import inbox


class Inbox:
    """The wishes that lie in a run's folder."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def take(self, history: History, plan: Plan) -> Iterator[Event]:
        """What each of them comes to; its file is gone once that is written down."""
        for path, wish in inbox.read(self._run):
            yield from [Noticed(wish)] if isinstance(wish, str) else events_of(wish, history, plan)
            path.unlink(missing_ok=True)


def events_of(wish: Wish, history: History, plan: Plan) -> list[Event]:
    """What a wish comes to now."""
    if wish.action == "try":
        return _tried(wish, history, plan)
    state = history.trials.get(-1 if wish.trial_id is None else wish.trial_id)
    if state is None:
        return [Noticed(f"{wish.action}: there is no trial {wish.trial_id}")]
    number = state.trial_id
    if state.dead:
        return [Noticed(f"{wish.action} {number}: the trial is out already ({state.dead})")]
    if wish.action == "drop":
        return [Asked("drop", number), Noticed(f"trial {number} was dropped by hand")]
    if number in history.dropped or state.goal >= plan.top_rung:
        why = "its checkpoint was given up" if number in history.dropped else "it runs in full, or has"
        return [Noticed(f"promote {number}: {why}")]
    return [Asked("promote", number), Noticed(f"trial {number} is promoted by hand as soon as it fits")]


def _tried(wish: Wish, history: History, plan: Plan) -> list[Event]:
    try:
        params = read_guess(wish.guess, Space.parse(plan.space))
    except SpaceError as error:
        return [Noticed(f"try {wish.guess[:200]}: {error}")]
    if plan.cost_class(params) not in plan.reference_rates:
        return [Noticed(f"try {wish.guess[:200]}: {plan.cost_class(params)} was found to be of no use here")]
    if (known := _same(params, history)) is not None:
        return [Noticed(f"try {wish.guess[:200]}: trial {known} has these values")]
    number = len(history.trials)
    added = TrialAdded(new_trial(plan, number, Proposal(params, HAND), history.measured))
    return [added, Asked("promote", number), Noticed(f"trial {number} was added by hand: {wish.guess[:200]}")]


def _same(params: Params, history: History) -> int | None:
    return next((n for n, state in history.trials.items() if dict(state.trial.params) == dict(params)), None)


class Guided:
    """A sampler that is told its first trials; implements the port ``Sampler``, as pure as the other."""

    def __init__(self, sampler: Sampler, guesses: tuple[str, ...]) -> None:
        self._sampler, self._guesses = sampler, guesses

    def propose(self, history: History, seed: int, first_number: int, count: int) -> list[Proposal]:
        """The guesses that the plan's space holds come first, whatever else the history has."""
        assert history.plan is not None
        first = [Proposal(params, HAND) for params in self._usable(history.plan)]
        mine = first[first_number : first_number + count]
        rest = count - len(mine)
        more = self._sampler.propose(history, seed, first_number + len(mine), rest) if rest else []
        return [*mine, *more]

    def _usable(self, plan: Plan) -> Iterator[Params]:
        """A quantization or a base that did not fit is no longer in the space."""
        space = Space.parse(plan.space)
        for text in self._guesses:
            try:
                params = read_guess(text, space)
            except SpaceError:
                continue
            if plan.cost_class(params) in plan.reference_rates:
                yield params
