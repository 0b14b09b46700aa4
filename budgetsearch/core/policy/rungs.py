"""The arithmetic of rungs: who has come to each of them, who has earned the next, and what a tie is worth."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import contenders
from budgetsearch.core.history.retired import STRATA, has_competed, has_entered
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.metric import chosen, difference, mean_of
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.evidence import clearly_worse, indistinguishable, paired_difference
from budgetsearch.core.records import ParamValue


@dataclass(frozen=True)
class Promotable:
    """A trial that may go on, and why."""

    state: TrialState
    reason: str


@dataclass(frozen=True)
class Rungs:
    """The rungs as they stand. They are pooled: a new trial competes with all that came before it."""

    plan: Plan
    history: History

    # ------------------------------------------------------------------- how many

    @property
    def started(self) -> int:
        """Trials that have run, or run now."""
        return self.history.retired.started + sum(s.started for s in self.history.active.values())

    def entered(self, rung: int) -> int:
        """Trials that have come to a rung; what fits in no memory has not."""
        return self._entered[rung]

    def competed(self, rung: int) -> int:
        """Trials of which a rung's best are the best: those that have come to it. Where others may be on
        their way for long, those whose loss there is known."""
        return self._competed[rung] if self.plan.workers > 1 else self._entered[rung]

    def sent(self, rung: int) -> int:
        """Trials that came to a rung by their place at the one below. Scouts come to the second whatever that
        is, and those that would not have got there owe nobody their promotion; nor does who began here."""
        return self.entered(rung) - (self._strays if rung == 1 else 0) - self._direct[rung]

    @cached_property
    def _direct(self) -> Counter[int]:
        above = (s for s in self.history.active.values() if s.trial.entry > 0)
        return self.history.retired.direct + Counter(
            s.trial.entry for s in above if has_entered(s, s.trial.entry)
        )

    @cached_property
    def _strays(self) -> int:
        scouts = filter(None, (self.history.trials.get(number) for number in range(self.plan.scouts)))
        here = [s for s in scouts if s.goal >= 1 and has_entered(s, 1)]
        place, quota = self.history.place, self.quota(0)
        return sum(s.goal == 1 and not (0 in s.losses and place(s, 0) <= quota) for s in here)

    @cached_property
    def _entered(self) -> Counter[int]:
        active = ((k, s) for s in self.history.active.values() for k in range(s.goal + 1))
        return self.history.retired.entered + Counter(k for k, s in active if has_entered(s, k))

    @cached_property
    def _competed(self) -> Counter[int]:
        active = ((k, s) for s in self.history.active.values() for k in range(s.goal + 1))
        return self.history.retired.competed + Counter(k for k, s in active if has_competed(s, k))

    def groups(self, trials: int) -> int:
        """Whole groups of ``eta``, each of which sends one trial up: nothing else here is rounded."""
        return trials // self.plan.eta

    def quota(self, rung: int) -> int:
        """Trials that a rung should have sent to the next: one of each whole group."""
        return self.groups(self.competed(rung))

    def due(self, rung: int) -> bool:
        """Fewer have come to the next rung than should have."""
        return self.sent(rung + 1) < self.quota(rung)

    # ------------------------------------------------------------------------ who

    def anybody_at(self, rung: int) -> bool:
        """Somebody who did nothing wrong was sent to a rung or beyond."""
        before = any(goal >= rung for goal in self.history.retired.able)
        return before or any(s.goal >= rung and not s.stuck for s in self.history.active.values())

    def running(self, rung: int) -> bool:
        """Somebody is on the way to a rung right now."""
        return any(s.running and s.goal == rung for s in self.history.active.values())

    def waiting(self, rung: int) -> list[tuple[int, TrialState]]:
        """Places and trials of a rung that may go on, best first; whoever was dropped has no checkpoint."""
        return self._waiting.get(rung, [])

    @cached_property
    def _waiting(self) -> dict[int, list[tuple[int, TrialState]]]:
        found: dict[int, list[tuple[int, TrialState]]] = {}
        for state in self.history.active.values():
            barred = state.stuck or state.running or state.trial_id in self.history.dropped
            if state.goal in state.losses and not barred:
                place = self.history.place(state, state.goal)
                found.setdefault(state.goal, []).append((place, state))
        return {rung: sorted(some, key=lambda one: one[0]) for rung, some in found.items()}

    def best(self, rung: int) -> list[tuple[int, TrialState]]:
        """Those that wait in the best places."""
        places = self._places(rung)
        return [(place, state) for place, state in self.waiting(rung) if place <= places]

    def earned(self, state: TrialState) -> bool:
        """A trial is among the best of the rung that it was sent to, ties aside."""
        rung = state.goal
        return rung in state.losses and self.history.place(state, rung) <= self._places(rung)

    def _places(self, rung: int) -> int:
        """The best places: each group has one, the last group whole or not."""
        return self.groups(self.competed(rung) + self.plan.eta - 1)

    def promotable(self, rung: int) -> list[Promotable]:
        """The best of a rung that have not gone on, best first.

        Ahead of them comes a trial that the validation examples cannot tell from the first, if it carries up
        a rank or a quantization that is new there.
        """
        best = self.best(rung)
        found = [
            Promotable(s, f"promotion: {self._standing(s, rung)}{self._margin(s, rung)}") for _, s in best
        ]
        for name, value in self._missing(rung, best[0][1]) if best else ():
            tie = self._tie(rung, best[0][1], name, value)
            if tie is not None:
                gap, error = paired_difference(*(s.example_losses[rung] for s in (best[0][1], tie)))
                why = f"{gap:.3f} from place {best[0][0]} with a standard error of {error:.3f}"
                first = f"the first with {name} {value} to go on"
                return [Promotable(tie, f"tie: {self._standing(tie, rung)}, {why}, {first}"), *found]
        return found

    def _standing(self, state: TrialState, rung: int) -> str:
        return f"place {self.history.place(state, rung)} of {self.competed(rung)} at rung {rung}"

    def _margin(self, state: TrialState, rung: int) -> str:
        """How much lower its loss is than that of the next place, in nats per token."""
        place = self.history.place(state, rung)
        behind = self.history.ranks[rung][place:]
        return f", {behind[0][0] - state.losses[rung]:.3f} ahead of place {place + 1}" if behind else ""

    def finalists(self) -> list[TrialState]:
        """Trials that may run in full, best first: those that got furthest, then the rest by rung; of one
        rung by their loss, unless the metric says otherwise. Whom the last training made worse comes
        behind all others."""
        ranked = self.by_loss()
        if self.plan.metric is None or self.plan.top_rung == 0:
            return ranked
        graded = [s for s in ranked if s.merits and s.rung == ranked[0].rung]
        rest = [s for s in ranked if not any(s is one for one in graded)]
        found: list[TrialState] = []
        while (best := chosen(graded, lambda s: (s.losses[s.rung], s.trial_id))) is not None:
            found.append(best)
            graded = [s for s in graded if s is not best]
        return found + rest

    def by_loss(self) -> list[TrialState]:
        """The same, whatever the metric says."""
        top, states = self.plan.top_rung, self.history.active.values()
        able = [s for s in states if s.goal < top and not s.stuck]
        if top == 0:
            return able
        kept = contenders(self.history)
        ranked = [s for s in able if s.trial_id in kept and s.rung in s.losses]
        ranked.sort(key=lambda s: (-s.rung, s.losses[s.rung], s.trial_id))
        return sorted(ranked, key=_spoiled)

    def preference(self, state: TrialState) -> str:
        """What the metric says of a finalist, where it was asked; after a comma."""
        metric, first = self.plan.metric, next((s for s in self.by_loss() if s.merits), None)
        if metric is None or first is None or not state.merits:
            return ""
        mean = mean_of(metric.merits(state.merits))
        apart = difference(first.merits, state.merits)
        if first is state or apart is None:
            return f", {metric.name} {mean:.3f}"
        beyond = (
            f"{apart[0]:+.3f} (standard error {apart[1]:.3f})"
            if metric.direction == "max"
            else (f"{-apart[0]:+.3f} (standard error {apart[1]:.3f})")
        )
        return f", {metric.name} {mean:.3f}: {beyond} from trial {first.trial_id}, whose loss is lower"

    # ----------------------------------------------------------------------- ties

    def _missing(self, rung: int, first: TrialState) -> list[tuple[str, ParamValue]]:
        """Values of the strata that no trial has carried beyond the rung; none if ``first`` brings one."""
        found: list[tuple[str, ParamValue]] = []
        for name in STRATA:
            above, here = self._values_above(rung, name), self._values_at(rung, name)
            if name in first.trial.params and first.trial.params[name] not in above:
                return []
            found += [(name, value) for value in sorted(here, key=here.__getitem__) if value not in above]
        return found

    def _values_above(self, rung: int, name: str) -> set[ParamValue | None]:
        above = {s.trial.params.get(name) for s in self.history.active.values() if s.goal > rung}
        for (goal, of), values in self.history.retired.first.items():
            if goal > rung and of == name:
                above |= set(values)
        return above

    def _values_at(self, rung: int, name: str) -> dict[ParamValue, int]:
        """Of each value that has come to the rung and no further the first trial."""
        here = dict(self.history.retired.first.get((rung, name), {}))
        for state in self.history.active.values():
            if state.goal == rung and name in state.trial.params:
                value = state.trial.params[name]
                here[value] = min(here.get(value, state.trial_id), state.trial_id)
        return here

    def _tie(self, rung: int, first: TrialState, name: str, value: ParamValue) -> TrialState | None:
        """The best that waits with a value, if it cannot be told from the first."""
        for _, state in self.waiting(rung):
            if state.trial.params.get(name) == value:
                losses = first.example_losses.get(rung, ()), state.example_losses.get(rung, ())
                return state if indistinguishable(*losses) else None
        return None


def _spoiled(state: TrialState) -> bool:
    """Its last training made it clearly worse than it was at the rung before."""
    before = max((rung for rung in state.losses if rung < state.rung), default=None)
    if before is None:
        return False
    return clearly_worse(state.example_losses.get(before, ()), state.example_losses.get(state.rung, ()))
