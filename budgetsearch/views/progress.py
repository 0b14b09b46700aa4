"""What a run shows while it goes: a live display in a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.text import Text

from budgetsearch.core.decisions import Run
from budgetsearch.core.events import (
    Calibrated,
    CheckpointLost,
    Closed,
    Decided,
    Entry,
    Event,
    Exported,
    Heartbeat,
    Noticed,
    Opened,
    Planned,
    Resumed,
    Scored,
    SegmentEnded,
    SegmentStarted,
)
from budgetsearch.core.history.accounts import Accounts
from budgetsearch.core.history.history import History
from budgetsearch.core.records import Calibration, Score, SegmentResult
from budgetsearch.core.reports import Beat
from budgetsearch.machine.host import gib
from budgetsearch.views.card import device_of
from budgetsearch.views.fitted import Fitted
from budgetsearch.views.shortfalls import ENDINGS
from budgetsearch.views.tables import answer_lines, clock, trial_table
from budgetsearch.views.words import (
    SCORING,
    Words,
    counted,
    params_text,
    phase_of,
    printable,
    rung_name,
    words_of,
)

BEAT_SECONDS = 15.0
"""A heartbeat is worth a plain line at most so often."""
LIVE_TRIALS = 10
MAX_LINES = 4
"""Latest lines that stand below the live table."""
QUIET = (Decided, Heartbeat)
REUSED = "measured on {}, used again; --fresh-calibration measures anew"


class Narrator:
    """Turns events into lines for people; remembers what the next line needs."""

    def __init__(self) -> None:
        self._reasons: dict[int, str] = {}
        self._beat_at = -BEAT_SECONDS

    def line(self, entry: Entry, history: History) -> str | None:
        """Put an event in a line, or None where it is worth none."""
        event = entry.event
        if isinstance(event, Decided):
            if isinstance(event.decision, Run):
                segments = event.decision.job.segments
                self._reasons = {s.trial_id: r for s, r in zip(segments, event.decision.reasons, strict=True)}
            return None
        if isinstance(event, Heartbeat):
            if entry.at - self._beat_at < BEAT_SECONDS:
                return None
            self._beat_at = entry.at
            return _beat_text(event.beat, entry.at, history)
        if isinstance(event, SegmentStarted):
            line: str | None = _started_text(event, self._reasons, history)
        else:
            line = _event_text(event, history)
        if line is not None:
            # The line of an event makes the next heartbeat superfluous for a while.
            self._beat_at = entry.at
        return line


class PlainProgress:
    """One plain line per meaningful event, with the elapsed seconds in front."""

    def __init__(self, write: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._write, self._now, self._start = write, now, now()
        self._narrator = Narrator()

    def see(self, entry: Entry, history: History) -> None:
        """Write the event's line, if it has one."""
        line = self._narrator.line(entry, history)
        if line:
            self._put(entry.at, line)

    def say(self, line: str) -> None:
        """Write a line about the preparation."""
        self._put(self._now() - self._start, line)

    def _put(self, seconds: float, line: str) -> None:
        try:
            self._write(printable(f"[{seconds:4.0f} s] {line}"))
        except OSError:
            # Whoever read the pipe has gone; that is no reason to end a run of a day.
            self._write = lambda line: None


class LiveProgress:
    """A display that stays in place: phase, time left, the rung table, the best so far, memory."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._narrator, self._crew = Narrator(), Crew()
        self._screen = _Screen(now=now, seen_at=now())
        self._live = Live(self._screen, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Transient: the final table follows, and the last state of the display would only repeat it.
        self._live.stop()

    def see(self, entry: Entry, history: History) -> None:
        """Show the run as it is now."""
        line = self._narrator.line(entry, history)
        if line and not isinstance(entry.event, QUIET):
            self._screen.note(line)
        self._crew.see(entry, history)
        # The display refreshes in a thread of its own, so it gets finished tables, not the history.
        crew = self._crew.line(history, device_of(history))
        self._screen.show(history, entry.at, crew)

    def say(self, line: str) -> None:
        """Show a line about the preparation."""
        self._screen.note(line)


@dataclass
class _Screen:
    """Content of the display; only the clock moves between two events."""

    now: Callable[[], float]
    seen_at: float
    spent: float = 0.0
    budget: float | None = None
    phase: str = "setup"
    body: Fitted | None = None
    details: tuple[str, ...] = ()
    lines: tuple[str, ...] = field(default=())

    def note(self, line: str) -> None:
        self.lines = (*self.lines, line)[-MAX_LINES:]

    def show(self, history: History, at: float, crew: str) -> None:
        self.spent, self.seen_at = at, self.now()
        self.budget = history.opened.budget_seconds if history.opened else None
        self.phase = phase_of(history)
        self.details = tuple(filter(None, (crew, *_details(history))))
        self.body = trial_table(history, LIVE_TRIALS) if history.trials else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        elapsed = self.spent + self.now() - self.seen_at
        head = f"{self.phase}   {clock(elapsed)} gone"
        if self.budget is not None:
            head += f"   {clock(self.budget - elapsed)} left of {clock(self.budget)}"
        parts: list[Text | Fitted] = [Text(head, style="bold")]
        parts += [self.body] if self.body is not None else []
        parts += [Text(line) for line in self.details]
        parts += [Text(line, style="dim") for line in self.lines]
        yield Group(*parts)


def _details(history: History) -> list[str]:
    lines = []
    best, beat = history.incumbent, history.last_beat
    if best is not None:
        loss = words_of(history).loss
        lines.append(f"best so far: trial {best.trial_id}, {loss} {best.best_loss:.4f}")
    if beat is not None and history.closed is None:
        lines.append(f"now: {_beat_words(beat, words_of(history))}")
    return lines


# ------------------------------------------------------------------------------- words


def _event_text(event: Event, history: History) -> str | None:
    if isinstance(event, Opened):
        return f"budget {event.budget_seconds:.0f} s"
    if isinstance(event, Resumed):
        return f"resumed: {history.spent:.0f} s are spent, {counted(len(history.trials), 'trial')} known"
    if isinstance(event, Calibrated):
        return _calibrated_text(event.calibration, words_of(history))
    if isinstance(event, Planned):
        return _planned_text(event, words_of(history))
    if isinstance(event, CheckpointLost) or (
        isinstance(event, SegmentEnded) and event.result.status == "lost"
    ):
        return history.notices[-1][1]
    if isinstance(event, SegmentEnded):
        return _ended_text(event.result, history)
    if isinstance(event, Noticed):
        return event.text
    if isinstance(event, Scored):
        return _scored_text(event.score, history)
    if isinstance(event, Exported):
        what = "adapter" if words_of(history).of_adapters else "result"
        return f"{what} of trial {event.trial_id} in {event.path}" + (" (final)" if event.final else "")
    if isinstance(event, Closed):
        # The error or the result that follows says why, once; of what was refused also that it failed.
        refused = event.state == "failed" and history.plan is None
        return f"finished: {event.reason}" if event.state == "finished" else None if refused else event.state
    return None


def _calibrated_text(found: Calibration, words: Words) -> str:
    if found.status != "ok":
        untimely = found.status in ("timeout", "refused") and found.detail  # which says it all
        why = ENDINGS[found.status] + (f" ({found.detail})" if found.detail else "")
        return f"{found.quantization} is not used: {found.detail if untimely else why}"
    if not words.of_adapters:
        again = f"; {REUSED.format(found.measured)}" if found.measured else ""
        rate, peak = found.tokens_per_second, gib(found.peak_bytes)
        return f"measured: {rate:.4g} {words.unit}/s, peak {peak}{again}"
    return (
        f"{found.quantization}: {found.tokens_per_second:.0f} tokens/s at micro-batch {found.micro_batch}"
        f"{_gang_text(found)}, loaded in {found.load_seconds:.1f} s, peak {gib(found.peak_bytes)}"
        + (f"; {REUSED.format(found.measured)}" if found.measured else "")
    )


def _gang_text(found: Calibration) -> str:
    """Name what the calibration made of gangs and of gradient checkpointing."""
    recompute = " with gradient checkpointing" if found.recompute else ""
    rates = [p.tokens_per_second for p in found.probes if p.members == found.gang > 1]
    return recompute + (f", {rates[-1]:.0f} with {found.gang} trials at once" if rates else "")


def _planned_text(event: Planned, words: Words) -> str:
    plan = event.plan
    rungs = ", ".join(f"{seconds:.0f} s" for seconds in plan.ladder[:-1])
    return (
        f"planned: {f'rungs of {rungs}' if rungs else 'no rungs'}, full run {plan.full_seconds:.0f} s, "
        f"reserve {plan.reserve_seconds:.0f} s"
        + (f", {plan.eval_examples} validation examples" if words.of_adapters else "")
        + (f", {plan.workers} workers" if plan.workers > 1 else "")
    )


def _started_text(event: SegmentStarted, reasons: Mapping[int, str], history: History) -> str:
    segment = event.segment
    head = f"trial {segment.trial_id} starts towards {rung_name(history, segment.rung)}"
    if history.plan and segment.rung == history.plan.top_rung:
        head = f"trial {segment.trial_id} trains in full"
    params = f"; {params_text(segment.params)}" if segment.start_tokens == 0 else ""
    beside = f", {len(reasons)} at once" if len(reasons) > 1 else ""
    return f"{head}: {reasons.get(segment.trial_id, 'as decided')}{beside}{params}"


def _ended_text(result: SegmentResult, history: History) -> str:
    head = f"trial {result.trial_id} {rung_name(history, result.rung)}: "
    if result.status != "ok":
        return head + ": ".join(filter(None, (result.status, result.detail)))
    words = words_of(history)
    loss = "checkpoint" if result.loss is None else f"{words.loss} {result.loss:.4f}"
    best = history.incumbent
    is_best = best is not None and best.best_checkpoint == result.checkpoint_out
    seconds = sum(result.seconds.values())
    return f"{head}{loss} at {result.tokens} {words.unit}, {seconds:.1f} s" + (
        ", best so far" if is_best else ""
    )


def _scored_text(score: Score, history: History) -> str:
    if score.status != "ok":
        return f"the final scores failed: {score.status} {score.detail}".rstrip()
    return "; ".join(answer_lines(history)) or "scored"


def _beat_text(beat: Beat, at: float, history: History) -> str:
    budget = history.opened.budget_seconds if history.opened else None
    left = "" if budget is None else f", {budget - at:.0f} s left"
    return _beat_words(beat, words_of(history)) + left


def _beat_words(beat: Beat, own: Words) -> str:
    who = "" if beat.trial_id is None or beat.activity in SCORING else f"trial {beat.trial_id} "
    words = [f"{who}{beat.activity}"]
    if beat.tokens:
        words.append(f"{beat.tokens} {own.unit}")
    if beat.loss is not None:
        words.append(f"training loss {beat.loss:.4f}")
    if beat.used_bytes:
        words.append(gib(beat.used_bytes))
    if beat.utilization is not None:
        words.append(f"card {beat.utilization:.0%} busy")
    if beat.celsius is not None:
        words.append(f"{beat.celsius:.0f} °C")
    return ", ".join(words)


@dataclass
class Crew:
    """The accounts of the entries that were seen; a process that resumes a run begins in its middle."""

    accounts: Accounts = field(default_factory=Accounts)
    resumed: bool = False

    def see(self, entry: Entry, history: History) -> None:
        """Take one more entry into account; ``history`` holds it already."""
        if isinstance(entry.event, Resumed):
            self.resumed = True
            self.accounts = Accounts(workers=history.workers, at=entry.at)
        self.accounts.apply(entry)

    def line(self, history: History, device: str) -> str:
        """Empty for one worker."""
        if max(self.accounts.most_workers, history.workers) == 1:
            return ""
        kind = "worker" if device == "cpu" else "GPU"
        since = " since the resume" if self.resumed else ""
        return (
            f"workers: {len(history.running)} of {history.workers} busy; "
            f"{clock(self.accounts.total)} of {kind} time{since}"
        )
