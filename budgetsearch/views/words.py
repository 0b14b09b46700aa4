"""The words of every display: the report, the terminal and the study say the same of the same thing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from budgetsearch.core.history.history import History
from budgetsearch.core.records import Params, Score

SCORING = ("score", "answers")
"""What a worker says of itself while it scores base and adapter."""


PER_BYTE = "nats per byte"
"""What models with tokens of their own are compared in."""


@dataclass(frozen=True)
class Words:
    """What a run calls its things: the training of adapters its own, a recipe others."""

    unit: str = "tokens"
    """What training is counted in."""
    loss: str = "loss"
    """What is minimized, ..."""
    measure: str = "nats per token"
    """... and its measure."""
    exact: str = "nats per completion token"
    """The same, in full."""
    before: str = "base"
    """What the best is held against."""
    after: str = "adapter"
    """What comes out."""

    @property
    def of_adapters(self) -> bool:
        """Whether adapters are trained, and no recipe."""
        return self.after == "adapter"


def words_of(history: History) -> Words:
    """The words of a run."""
    recipe = history.opened.facts.get("recipe") if history.opened else None
    if not recipe:
        several = history.opened is not None and "models" in history.opened.facts
        return Words(measure=PER_BYTE, exact=f"{PER_BYTE} of completion") if several else Words()
    metric = str(recipe.get("metric", "loss"))
    return Words(str(recipe.get("unit", "units")), metric, metric, metric, "untrained", "trained")


GRADINGS = {
    "task": "reasoning-gym's own grading",
    "final": "exact match of what follows ####",
    "text": "exact match of the text",
}
"""How answers are graded."""


def accuracy_of(score: Score) -> str:
    """What the task accuracy is: how many answers, and how they were graded where the score says."""
    known = dict.fromkeys(GRADINGS.get(sample.get("grading", "")) for sample in score.samples)
    return ", ".join([f"n = {score.task_examples}", *filter(None, known)])


def phase_of(history: History) -> str:
    """Phase of a run: setup, calibrate, search, full run, score, or how it was closed."""
    if history.closed is not None:
        return history.closed.state
    if history.opened is None:
        return "setup"
    if history.plan is None:
        return "calibrate"
    beat = history.last_beat
    if history.score is not None or (beat and beat.activity in SCORING and not history.running):
        return "score"
    return "full run" if history.full_trials else "search"


LONG_NAMES = 5
"""With more rungs an axis names them by their numbers alone."""
SAMPLE_CHARACTERS = 600
"""A sample answer is cut there."""
STOPPED, CUT_OFF = "stopped", "cut off"
"""Of a run that nobody closed and no process works on; of a trial that trained when that happened."""
STATE_MEANS = {
    "finished": "it came to its own end",
    "interrupted": "it was asked to stop and wrote down how it stood; it can go on",
    "failed": "it ended with an error",
    STOPPED: "its process was killed or its machine went down, and no process works on it; it can go on",
}
"""In words, for people; any other state is a phase of a run that goes."""


def state_of(history: History, going: bool) -> str:
    """The phase of a run that goes, how a run was closed, or ``stopped``; ``going``: a process works on it.

    The ledger alone cannot tell a run that goes from one whose process was killed: the folder's lock can.
    """
    return phase_of(history) if history.closed is not None or going else STOPPED


def counted(count: int, what: str) -> str:
    """So many of something: ``1 trial``, ``2 trials``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def rung_name(history: History, rung: int) -> str:
    """A rung as people call it."""
    return "full run" if history.plan is not None and rung == history.plan.top_rung else f"rung {rung}"


def rung_names(history: History) -> list[str]:
    """A heading for each rung, with its seconds of training."""
    if history.plan is None:
        return []
    return [
        f"{rung_name(history, rung)} ({seconds:.0f} s)" for rung, seconds in enumerate(history.plan.ladder)
    ]


def rung_ticks(ladder: Sequence[float]) -> list[str]:
    """A rung's name for the axis of a plot, in two short lines: many must stand side by side on a phone."""
    top = len(ladder) - 1
    long = len(ladder) <= LONG_NAMES
    return [
        f"{('full run' if long else 'full') if rung == top else f'rung {rung}' if long else str(rung)}"
        f"<br>{short_duration(seconds)}"
        for rung, seconds in enumerate(ladder)
    ]


def short_duration(seconds: float) -> str:
    """Seconds, minutes or hours with two or three digits."""
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""C0 and C1, which a terminal obeys; line breaks and tabs do no harm."""


def printable(text: str) -> str:
    """A text that others may have written, as it may be printed: control characters are shown."""
    return text.translate(CONTROL)


def cut(text: object) -> str:
    """A text that may be long, as far as people read it."""
    whole = str(text)
    return whole[:SAMPLE_CHARACTERS] + (" ..." if len(whole) > SAMPLE_CHARACTERS else "")


def params_text(params: Params) -> str:
    """A configuration on one line."""
    return " ".join(f"{name}={value_text(value)}" for name, value in params.items())


def value_text(value: object) -> str:
    """A value with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def loss_text(loss: float | None) -> str:
    """A loss with four digits, or a dash."""
    return "-" if loss is None else f"{loss:.4f}"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(map(_row, [heads, ["---"] * len(heads), *rows]))


def _row(cells: Sequence[str]) -> str:
    # A stray bar or line break would end the cell.
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
