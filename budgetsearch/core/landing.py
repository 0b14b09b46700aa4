"""The end of a full run, found by its own clock: cooled down, evaluated and saved by the moment it was given.

A segment is planned at the rate that was foreseen. While it trains, a ``Pilot`` looks at the rate that it
really has, after every optimizer step, and moves the end to where the time allows: earlier on a machine that
has become slower, later on one that has become faster. What it decides are ``Revision`` records, from which
the learning rate of every step follows, so that the segment can be trained again exactly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from budgetsearch.core.records import Revision, Schedule, Segment
from budgetsearch.core.schedule import ending_at

WINDOW_SHARE = 0.1
"""The rate is that of the last tenth of the segment's time, ..."""
WINDOW_SECONDS = 60.0
"""... of the last minute at most, ..."""
WINDOW_STEPS = 3
"""... and of so many steps at least."""
DOUBT = 0.25
"""What was foreseen weighs as much as so large a part of a window, until one is full."""
MARGIN = 0.97
"""Of the seconds that are left for training so many are planned: no two steps take the same time."""
STEPS_KEPT = 1.5
"""So many steps are kept beside them: one is under way when the time is up."""
NOTEWORTHY = 0.04
"""The end moves where it is off by so large a share of the way that is left, and by two steps at least."""

TOLD_SHARE = 0.1
"""The user hears of an end that moves by so large a part."""


@dataclass
class Pilot:
    """Decides after every step where a segment ends and which schedule holds from there."""

    segment: Segment
    schedule: Schedule = field(init=False)
    """The one that holds now."""
    stop: int = field(init=False)
    """Tokens at which the segment ends, as things stand."""
    revisions: list[Revision] = field(init=False)
    """All that were made, those to be repeated included."""
    slowness: float = 1.0
    """How many times longer a token takes than foreseen."""

    def __post_init__(self) -> None:
        self.schedule, self.stop = self.segment.schedule, self.segment.stop_tokens
        self.revisions = []
        self._marks: deque[tuple[float, int]] = deque()
        self._looked = 0.0
        self._planned = list(self.segment.revisions)
        self._told = self.segment.stop_tokens

    @property
    def _ends(self) -> bool:
        """The end of the segment is that of the whole full run."""
        return self.segment.schedule.cooldown_tokens > 0 and (
            self.segment.stop_tokens >= self.segment.schedule.stop_tokens
        )

    def begin(self, tokens: int, elapsed: float) -> None:
        """Training begins (again), ``elapsed`` seconds after the job began."""
        self._marks.clear()
        self._marks.append((elapsed, tokens))

    def look(self, tokens: int, elapsed: float) -> Revision | None:
        """After a step: the trial has seen ``tokens``, ``elapsed`` seconds after its job began.

        Returns what is changed, if anything is; ``stop`` and ``schedule`` hold from then on.
        """
        while self._planned and self._planned[0].tokens <= tokens:
            self._revise(self._planned.pop(0))
        landing = self.segment.landing
        if landing is None or tokens >= self.stop:
            return None
        rate, step = self._rate(tokens, elapsed)
        self.slowness = landing.rate / rate
        left = landing.seconds - elapsed - landing.overhead_seconds * max(1.0, self.slowness)
        affordable = tokens + max(0, int(rate * (MARGIN * left - STEPS_KEPT * step)))
        if not self._ends:
            if affordable <= tokens:  # a link only stops: where the run ends is planned anew
                self.stop = tokens
            return None
        end = min(affordable, max(landing.longest, self.segment.stop_tokens))
        return self._moved(tokens, max(end, tokens), int(rate * step), elapsed)

    def news(self, change: Revision, unit: str = "tokens") -> str:
        """What the user should hear of a change; nothing if much the same was said before.

        The rate is its reason only where it changed by as much, and in the same direction: a run also ends
        earlier because less time was left for it than was planned.
        """
        end, told = change.schedule.stop_tokens, self._told
        if abs(end - told) < TOLD_SHARE * told:
            return ""
        self._told = end
        later, faster, times = end > told, change.rate > 1.0, max(change.rate, 1.0 / change.rate)
        why = f"there is {'more' if later else 'less'} time for it than was planned"
        if later == faster and times >= 1.0 + TOLD_SHARE:
            why = f"training is {times:.1f} times {'faster' if faster else 'slower'} than foreseen"
        return (
            f"trial {self.segment.trial_id}: {why}; its full run now ends at {end:,} {unit} "
            f"instead of {told:,}"
        )

    def _moved(self, tokens: int, end: int, step: int, elapsed: float) -> Revision | None:
        """The end is moved to ``end`` if that is worth a word; what cannot be reached is given up at once."""
        off = end - self.stop
        if abs(off) <= max(2 * step, NOTEWORTHY * (self.stop - tokens)) and end > tokens:
            return None
        if off > 0 and elapsed - self._looked < self._window() / 2:
            return None  # what comes and goes does not move it to and fro
        self._looked = elapsed
        schedule = replace(self.schedule, stop_tokens=tokens)
        if end > tokens:
            schedule = ending_at(self.schedule, tokens, end)
        change = Revision(tokens, schedule, round(1.0 / self.slowness, 4))
        self._revise(change)
        return change

    def _revise(self, change: Revision) -> None:
        self.revisions.append(change)
        self.schedule = change.schedule
        if self.segment.landing is not None:  # else it is a repetition, which knows its end
            self.stop = change.schedule.stop_tokens

    def _window(self) -> float:
        landing = self.segment.landing
        return min(WINDOW_SECONDS, WINDOW_SHARE * landing.seconds) if landing else WINDOW_SECONDS

    def _rate(self, tokens: int, elapsed: float) -> tuple[float, float]:
        """Tokens per second of late, and the seconds of the longest step of late."""
        landing, marks, window = self.segment.landing, self._marks, self._window()
        assert landing is not None
        marks.append((elapsed, tokens))
        while len(marks) > WINDOW_STEPS + 1 and elapsed - marks[1][0] >= window:
            marks.popleft()
        span, seen = elapsed - marks[0][0], tokens - marks[0][1]
        weight = DOUBT * max(0.0, window - span)
        rate = (seen + weight * landing.rate) / max(1e-9, span + weight)
        steps = [b[0] - a[0] for a, b in zip(marks, list(marks)[1:], strict=False)]
        return max(1e-9, rate), max(steps, default=0.0)


MOST_LOOKS = 300
"""Of a simulated segment: one that has thousands of steps is looked at in larger ones."""


@dataclass(frozen=True)
class Flight:
    """What became of a segment that landed itself, in virtual time."""

    tokens: int
    seconds: float
    """Of training."""
    revisions: tuple[Revision, ...]


def fly(segment: Segment, step_tokens: float, seconds: Callable[[int, float], float]) -> Flight:
    """Land a segment in virtual time: for simulated worlds.

    ``seconds(tokens, elapsed)``: what a token takes then, ``elapsed`` seconds after the job began.
    """
    pilot, tokens, elapsed = Pilot(segment), segment.start_tokens, 0.0
    pilot.begin(tokens, elapsed)
    step = max(1, round(step_tokens), (segment.stop_tokens - tokens) // MOST_LOOKS)
    while tokens < pilot.stop:
        made = min(step, pilot.stop - tokens)
        elapsed += made * seconds(tokens, elapsed)
        tokens += made
        pilot.look(tokens, elapsed)
    return Flight(tokens, elapsed, tuple(pilot.revisions))
