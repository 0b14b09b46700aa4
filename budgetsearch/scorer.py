"""After the search: the final scores of one checkpoint, its losses and its answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from budgetsearch.core.records import Job, Score
from budgetsearch.flights import Landing


def limit_of(seconds: float, patience: float) -> float:
    """How long a score may take where ``seconds`` are left for scores; one that then does not hear that it
    is to stop is killed after ``patience`` seconds more.

    The kill falls within the scores' own time. Where that is little, a third of it is kept for the kill: the
    rest of the patience, itself a third of what export and exit have at most, is theirs.
    """
    return seconds - min(patience, max(0.0, seconds) / 3)


@dataclass
class Scorer:
    """Takes every score, on as many workers as there are, and tells them in the order of the jobs."""

    dispatch: Callable[[Job], None]
    """Gives a job to a free worker."""
    note: Callable[[Score], None]
    """Writes down what was found."""
    waiting: list[Job]
    """What is still to be scored, the losses first."""
    several: bool
    """Whether there are several workers: then one that crashed may have gone away with its node."""
    _order: list[int] = field(init=False)
    _found: dict[int, Score] = field(default_factory=dict)
    _again: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._order = [job.job_id for job in self.waiting]

    def begin(self, limit_seconds: float) -> None:
        """Begin with the next score, which may take so many seconds."""
        self.dispatch(replace(self.waiting.pop(0), limit_seconds=limit_seconds))

    def give_up(self) -> None:
        """There is no time for what has not begun."""
        late = {job.job_id for job in self.waiting}
        self._order = [number for number in self._order if number not in late]
        self.waiting.clear()

    def take(self, landing: Landing) -> None:
        """A score has ended; on several workers one that crashed is taken once more."""
        number = landing.job.job_id
        (outcome,) = landing.report.results
        assert isinstance(outcome, Score)
        if outcome.status == "crashed" and self.several and number not in self._again:
            self._again.add(number)
            self.waiting.insert(0, landing.job)
        else:
            self._found[number] = outcome

    def tell(self) -> None:
        """Write down what has ended, as far as all before it has."""
        while self._order and self._order[0] in self._found:
            self.note(self._found[self._order.pop(0)])
