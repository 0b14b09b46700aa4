"""A comparison for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from budgetsearch.machine.host import gib
from budgetsearch.tools.compare.comparison import CAVEATS, Compared, Comparison
from budgetsearch.tools.compare.pairing import Apart, Run
from budgetsearch.views.fitted import table_of
from budgetsearch.views.intervals import Estimate
from budgetsearch.views.report.peaks import PROCESS_PEAK

SHOWN_PAIRS = 12
"""Pairs of each measure that a terminal shows; the page has all of them."""
NOT_MEASURED = "not measured"
TOO_FEW = "too few"
"""In place of an interval."""


def show(found: Comparison) -> Group:
    """Standings with what each run cost, then pairs, then what must be known."""
    parts: list[RenderableType] = [runs_table(found)]
    for compared in found.compared:
        if compared.pairs:
            parts += [Text(""), pairs_table(compared)]
    if found.winnings:
        parts += [Text(""), winnings_table(found)]
    apart = [f"not compared: {apart_text(one)}" for one in found.apart]
    lines = [*apart, *found.warnings, *found.remarks]
    parts += [Text(""), *[Text(line) for line in lines], *[Text(line, style="dim") for line in CAVEATS]]
    return Group(*parts)


def runs_table(found: Comparison) -> Table:
    """Everyone in one table: what they reached and what they cost."""
    apart = "\n[" if len(found.compared) > WIDE else " ["
    shown = [[name, *(cell.replace(" [", apart) for cell in cells)] for name, cells in rows(found)]
    return table_of("Runs", ["", *headings(found)], shown)


COSTS: Sequence[tuple[str, Callable[[Run], str]]] = (
    ("device\nseconds", lambda run: f"{run.costs.device_seconds:.0f}"),
    ("energy", lambda run: energy_text(run.costs.watt_hours)),
    (PROCESS_PEAK.replace("of ", "of\n"), lambda run: peak_text(run.costs.peak_bytes)),
    ("space", lambda run: run.space or "-"),
)
MONEY = "cost"
"""With ``--price``: of the device seconds."""
STATE = "state"
"""A column where not all have finished."""
WIDE = 2
"""With more measures their intervals stand below them."""


def headings(found: Comparison) -> list[str]:
    """Of the columns behind the name."""
    titles = [measure_title(one, found).replace(" (", "\n(") for one in found.compared]
    money = [MONEY] if found.price is not None else []
    return [*titles, *[name for name, _ in COSTS], *money, *([STATE] if _unfinished(found) else [])]


def rows(found: Comparison) -> list[tuple[str, list[str]]]:
    """(name, cells) of all bases, which the runs began from, then of all runs in the order of naming."""
    runs = {run.name: run for run in found.runs}
    measured = {name for one in found.compared for name in one.means}
    bases = [name for name in found.bases.values() if name in measured]
    return [(name, _cells(name, runs.get(name), found)) for name in (*bases, *runs)]


def _cells(name: str, run: Run | None, found: Comparison) -> list[str]:
    measured = [interval_text(one.means[name], one) if name in one.means else "-" for one in found.compared]
    state = [run.state if run else "-"] if _unfinished(found) else []
    price = found.cost(run) if run else None
    money = [] if found.price is None else ["-" if price is None else f"{price:.2f}"]
    return [*measured, *[cost(run) if run else "-" for _, cost in COSTS], *money, *state]


def _unfinished(found: Comparison) -> bool:
    return any(run.state != "finished" for run in found.runs)


def measure_title(one: Compared, found: Comparison) -> str:
    """Its name and how many examples; sets of rows are told apart by a letter."""
    alike = [other for other in found.compared if other.measure.name == one.measure.name]
    letter = f", rows {chr(ord('A') + alike.index(one))}" if len(alike) > 1 else ""
    return f"{one.measure.name}{letter} (n = {one.measure.examples})"


def pairs_table(compared: Compared) -> Table:
    """Each pair with its difference, interval, p-value and verdict."""
    measure = compared.measure
    better = "more" if measure.higher_is_better else "less"
    title = f"Paired differences of {measure.name}, {measure.examples} examples ({better} is better)"
    shown = pair_rows(compared)[:SHOWN_PAIRS]
    table = table_of(title, ["", "difference", "p (Holm)", "better"], shown, left=("better",))
    captions = list(measure.notes)
    if len(compared.pairs) > SHOWN_PAIRS:
        captions.append(f"{len(compared.pairs) - SHOWN_PAIRS} more pairs stand in compare.html")
    if captions:
        table.caption = Text("; ".join(captions))
        table.caption_justify = "left"
    return table


def pair_rows(compared: Compared) -> list[list[str]]:
    """Cells of all pairs: which, difference, p-value, the better one."""
    return [
        [
            f"{pair.first} against {pair.second}",
            interval_text(Estimate(pair.difference, pair.low, pair.high), compared, signed=True),
            "< 0.001" if pair.adjusted_p < 0.001 else f"{pair.adjusted_p:.3f}",
            compared.better(pair) or "not told apart",
        ]
        for pair in compared.pairs
    ]


def winnings_table(found: Comparison) -> Table:
    """The challenge's score."""
    title = "Score as in the NeurIPS LLM Efficiency Challenge (geometric mean of win rates)"
    shown = [
        [one.name, *(f"{value:.3f}" for value in (*one.rates.values(), one.mean, one.score))]
        for one in found.winnings
    ]
    return table_of(title, ["", *found.winnings[0].rates, "mean win rate", "score"], shown)


def apart_text(apart: Apart) -> str:
    """Which runs, what of them, and why not."""
    one, other = ", ".join(apart.first), ", ".join(apart.second)
    return f"{apart.measure} of {one} with that of {other}: {apart.why}"


def interval_text(found: Estimate, compared: Compared, *, signed: bool = False) -> str:
    """``0.1042 [0.0711, 0.1390]``, or in percent."""
    sign = "+" if signed else ""

    def text(number: float) -> str:
        return f"{100 * number:{sign}.1f}%" if compared.measure.shares else f"{number:{sign}.4f}"

    if compared.too_few:
        return f"{text(found.value)} [{TOO_FEW}]"
    if found.low is None or found.high is None:
        return text(found.value)
    return f"{text(found.value)} [{text(found.low)}, {text(found.high)}]"


def peak_text(peak_bytes: int | None) -> str:
    """In GiB, or that nobody measured it."""
    return gib(peak_bytes) if peak_bytes else NOT_MEASURED


def energy_text(watt_hours: float | None) -> str:
    """In Wh, or that nobody measured it."""
    return NOT_MEASURED if watt_hours is None else f"{watt_hours:.1f} Wh"
