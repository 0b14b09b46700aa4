"""Which trials may still run, and which checkpoints the run may still want: the rest is forgotten for good.

Parts of the fold: what they change is the history that they are given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from budgetsearch.core.history.history import Ahead, History
from budgetsearch.core.history.retired import Retired
from budgetsearch.core.history.trial import TrialState, best_of, fall_back, settle, spares
from budgetsearch.core.resources.disk import runners_up


def contenders(history: History) -> set[int]:
    """Trials that may still run: once a rung has been promoted from, its best and a few behind."""
    states = history.active.values()
    kept = {t.trial_id for t in states if not t.dead and t.trial_id not in history.dropped}
    for rung in history.passed:
        quota = _quota(history, rung)
        here = (t for t in states if t.goal == rung and rung in t.losses)
        kept -= {t.trial_id for t in here if history.place(t, rung) > quota and not t.wished}
    return kept - _beyond_the_disk(history, kept)


def _quota(history: History, rung: int) -> int:
    """So many of a rung's best are kept once it has been promoted from."""
    eta = history.plan.eta if history.plan else 1
    return -(-history.reached[rung] // eta) + _runners_up(history)


def _beyond_the_disk(history: History, kept: set[int]) -> set[int]:
    """Those of the trials whose checkpoints have no room: of each rung's best as many are kept."""
    limit = history.plan.max_held if history.plan else None
    if limit is None:
        return set()
    waiting = {n: t for n in kept if (t := history.trials[n]).checkpoint and not t.running}
    for number in history.full_done:
        waiting.pop(number, None)
    places: dict[int, int] = {}
    for rung in {t.rung for t in waiting.values()}:
        mine = sorted(
            (t.losses[rung], t.trial_id) for t in waiting.values() if t.rung == rung and rung in t.losses
        )
        places |= {number: place for place, (_, number) in enumerate(mine)}

    def rank(state: TrialState) -> tuple[bool, bool, int, int, int]:
        paused, place = state.goal <= state.rung, places.get(state.trial_id, 0)
        return state.trial_id not in history.full_trials, paused, place, -state.rung, state.trial_id

    return {t.trial_id for t in sorted(waiting.values(), key=rank)[limit:]}


def _runners_up(history: History) -> int:
    plan = history.plan
    return runners_up(plan.budget_seconds / plan.full_seconds, plan.workers) if plan else 0


def needed_checkpoints(history: History) -> set[str]:
    """Names of the checkpoints that the run may still want."""
    best = history.incumbent
    if history.closed is not None and history.closed.state == "finished":
        return {best.best_checkpoint} if best and best.best_checkpoint else set()
    return _needed(history, contenders(history))


def _needed(history: History, open_still: set[int]) -> set[str]:
    best = history.incumbent
    wanted = {best.best_checkpoint} if best else set()
    wanted |= {history.trials[number].checkpoint for number in open_still - set(history.full_done)}
    wanted |= {s.checkpoint_in for segments in history.running.values() for s in segments}
    if not history.unwritten:  # on a full disk spares have to go
        holders = [history.trials[number] for number in sorted(history.holders)]
        wanted |= spares(best, holders) if best else set()
        for number in history.full_trials:
            wanted |= {one.name for one in history.trials[number].held[-2:]}
    return {name for name in wanted if name}


def forget_after(history: History, state: TrialState) -> None:
    """What is not needed after a trial's segment is not on disk from now on.

    With many workers most ends concern nobody else: then nobody else is looked at, so that folding a ledger
    takes time in proportion to its length.
    """
    out = {t.trial_id: t for t in _out_of_quota(history, state)}
    concerned = {state.trial_id: state, **out}.values()
    if not _concerns_only(history, concerned):
        forget(history)
        return
    for one in concerned:
        if (one.dead or one.trial_id in out) and (one.rung >= 0 or one.checkpoint):
            history.dropped.add(one.trial_id)
        closed = one.dead or one.trial_id in history.dropped or one.trial_id in history.full_done
        needed = set() if closed else {one.checkpoint}
        if one.trial_id in history.full_trials:
            needed |= {checkpoint.name for checkpoint in one.held[-2:]}
        _keep(history, one, needed)
        _retire(history, [one])


def _out_of_quota(history: History, state: TrialState) -> list[TrialState]:
    """The trials that a new loss has pushed beyond what is kept of a rung: one, or the trial itself. All who
    were beyond it before are out already, as long as nothing else has changed."""
    found = []
    for rung in history.passed:
        quota, ranked = _quota(history, rung), history.ranks.get(rung, ())
        pushed = [history.trials[number] for _, number in ranked[quota : quota + 1]]
        if rung in state.losses and history.place(state, rung) > quota:
            pushed.append(state)
        out = [t for t in pushed if t.goal == rung and not (t.dead or t.wished)]
        found += [t for t in out if t.trial_id not in history.dropped]
    return found


def _concerns_only(history: History, states: Collection[TrialState]) -> bool:
    """Whether for all other trials everything is as it was when all were last looked at."""
    ahead, limit = history.ahead, history.plan.max_held if history.plan else None
    if ahead is None or history.unwritten or (limit is not None and len(history.holders) > limit):
        return False
    for state in states:
        if state.trial_id in ahead.trials or state.running:
            return False
        if state.best_loss is not None and (state.best_loss, state.trial_id) <= ahead.best:
            return False
        if state.is_final or any(one.is_final for one in state.held):
            return False
        mine = best_of(state.held)
        if mine is not None and mine.loss is not None and (mine.loss, -mine.tokens) <= ahead.second:
            return False
    return True


def _look_ahead(history: History) -> Ahead | None:
    best = history.incumbent
    if best is None or best.best_loss is None:
        return None
    others = [history.trials[number] for number in sorted(history.holders - {best.trial_id})]
    second = best_of(one for trial in others for one in trial.held)
    if second is None or second.loss is None:
        return None
    loss, tokens = second.loss, -second.tokens
    owner = next(t.trial_id for t in others if any(one is second for one in t.held))
    return Ahead((best.best_loss, best.trial_id), (loss, tokens), frozenset((best.trial_id, owner)))


def forget(history: History) -> None:
    """What is not needed now is not on disk from now on."""
    open_still = contenders(history)
    history.dropped |= {
        t.trial_id for t in history.active.values() if t.rung >= 0 or t.checkpoint
    } - open_still
    needed = _needed(history, open_still)
    for number in list(history.holders):
        _keep(history, history.trials[number], needed)
    _retire(history, list(history.active.values()))
    history.ahead = _look_ahead(history)


def _keep(history: History, state: TrialState, needed: Collection[str | None]) -> None:
    if any(one.name not in needed for one in state.held):
        state.held = tuple(one for one in state.held if one.name in needed)
    if not state.held and not state.exported:
        history.holders.discard(state.trial_id)


def _retire(history: History, states: Iterable[TrialState]) -> None:
    for state in states:
        over = state.dead or state.trial_id in history.dropped
        if over and not state.running and history.active.pop(state.trial_id, None) is not None:
            history.retired.add(state)


def recount(history: History) -> None:
    """Something became of many trials at once."""
    history.holders = {t.trial_id for t in history.trials.values() if t.held or t.exported}
    regroup(history)


def regroup(history: History) -> None:
    """Who may still run, and what counts of the others, from what is known of each trial."""
    history.active, history.retired = dict(history.trials), Retired()
    history.ahead = None
    _retire(history, list(history.active.values()))


def lose(history: History, name: str, why: str, *, exported: bool = False) -> None:
    """A checkpoint is no good any more; ``exported``: nor is the adapter that was made from it."""
    done = history.exported
    stands = done is not None and done.checkpoint == name and not exported
    history.lost.append((name, why))
    said = [f"checkpoint {name} is lost ({why})"]
    for state in history.trials.values():
        mine = next((s for s in (*state.held, state.exported) if s and s.name == name), None)
        if mine is None and state.checkpoint != name:
            continue
        if stands and mine is not None and mine.loss is not None:
            state.exported = mine
        elif mine is state.exported:
            state.exported = None
        said.append(fall_back(state, name))
        state.best_loss = state.best_checkpoint = None
    for state in history.trials.values():
        settle(state)
    recount(history)
    history.notices.append((history.spent, "; ".join(filter(None, said))))
