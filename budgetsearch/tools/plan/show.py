"""A preview for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from budgetsearch.machine.host import GIB
from budgetsearch.tools.plan.bases import BaseRow, BasesPreview, named
from budgetsearch.tools.plan.preview import FitCell, Preview
from budgetsearch.tools.plan.recipe import RecipePreview
from budgetsearch.views.fitted import table_of


def show(found: Preview | RecipePreview | BasesPreview) -> Group:
    """Everything, the answer first."""
    if isinstance(found, BasesPreview):
        return Group(Text(_choice(found)), Text(""), _bases(found), Text(""), _guesses(found))
    if isinstance(found, RecipePreview):
        return Group(Text(_recipe_head(found)), Text(""), _ladder(found), Text(""), _phases(found))
    parts: list[RenderableType] = [
        Text(_head(found)),
        Text(""),
        _ladder(found),
        Text(""),
        _phases(found),
        Text(""),
        *_fits(found),
        *_refused(found),
        Text(""),
        _speed(found),
        Text(""),
        _reserve(found),
        Text(""),
        Text(_disk(found)),
        Text(""),
        _guesses(found),
    ]
    return Group(*parts)


def clock(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds of what is short."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _head(found: Preview) -> str:
    plan, rehearsal = found.rehearsal.plan, found.rehearsal
    passes = rehearsal.full_tokens / max(1.0, found.tokens_per_row * found.train_rows)
    slower = f" If everything takes {found.slow:g} times as long:" if found.slow != 1 else ""
    size = f" ({found.weights / 1e9:.2f}B)" if found.weights else ""
    basis = "measured here" if found.measured else "foreseen; a run measures before it plans"
    each = f" on each of {plan.workers} workers" if plan.workers > 1 else ""
    total = plan.workers * plan.budget_seconds
    together = f" ({clock(total)} of all workers together)" if plan.workers > 1 else ""
    return (
        f"{found.model}{size} on {found.card}, {found.usable_bytes / GIB:.2f} GiB{each}, "
        f"{clock(plan.budget_seconds)}{together}\n"
        + (f"{found.note}\n" if found.note else "")
        + f"{found.data}: {found.rows} rows of {found.tokens_per_row:.0f} tokens\n"
        f"This is {basis}.{slower}\n"
        f"{_tried(found)}; the best trains for "
        f"{tokens_text(rehearsal.full_tokens)}, {times_text(passes)} the data." + _enough(found)
    )


def tokens_text(tokens: float) -> str:
    """A number of tokens in three figures."""
    return f"{tokens / 1e6:.3g}M tokens" if tokens >= 1e5 else f"{tokens:,.0f} tokens"


def times_text(passes: float) -> str:
    """How often the data were seen; of less than a tenth the share."""
    return f"{passes:.1f} times" if passes >= 0.1 else f"{passes:.1%} of"


def _tried(found: Preview) -> str:
    trials, hours = found.rehearsal.trials[0], found.search_hours
    if trials > 1:
        return f"About {trials} configurations are tried"
    later = hours * 3600 > found.rehearsal.plan.budget_seconds
    return "One configuration, no comparison" + (
        f" (from {hours:.2g} hours on it is a search)" if later else ""
    )


def _enough(found: Preview) -> str:
    if found.enough_hours is None:
        return ""
    return f"\nMore than {found.enough_hours:.2g} hours will hardly help with these {found.rows} rows."


def _choice(found: BasesPreview) -> str:
    chosen = found.choice
    return "\n".join(
        [
            f"{found.card}, {found.usable_bytes / GIB:.2f} GiB, {clock(found.budget_seconds)}",
            *filter(None, [found.note]),
            f"{found.data}: {found.rows} rows of {found.tokens_per_row:.0f} tokens",
            "This is foreseen; a run measures before it plans.",
            f"Take {named(chosen)}: about {chosen.trials} configurations, and the best trains for "
            f"{tokens_text(chosen.full_tokens)}, {times_text(chosen.passes)} the data.",
            *(f"- {reason}" for reason in found.ground),
        ]
    )


def _bases(found: BasesPreview) -> Table:
    heads = ["model", "quantization", "fits", "GiB", "rank", "micro-batch", "tokens/s", "full run", "trials"]
    return table_of(
        "The bases, each as the only one", heads, map(_base, found.bases), left=("quantization", "fits")
    )


def _base(base: BaseRow) -> list[str | Text]:
    again = " (c)" if base.recompute else ""
    fits = Text(f"yes{again}" if base.fits else "no", style="green" if base.fits else "red")
    if base.why and not base.fits and not base.peak_bytes:
        fits.append(f": {base.why}")
        return [base.model, base.quantization, fits, *[""] * 6]
    peak = f"{base.peak_bytes / GIB:.1f}"
    if not base.fits:
        return [base.model, base.quantization, fits, f"{peak} at least", *[""] * 5]
    full = tokens_text(base.full_tokens) if base.full_tokens else "none"
    each = [str(base.rank), str(base.micro_batch), f"{base.tokens_per_second:,.0f}", full, str(base.trials)]
    return [base.model, base.quantization, fits, peak, *each]


def _recipe_head(found: RecipePreview) -> str:
    trials = found.rehearsal.trials[0]
    tried = f"About {trials} configurations are tried" if trials > 1 else "One configuration, no comparison"
    rates = ", ".join(f"{one.tokens_per_second:.4g} units/s" for one in found.calibrations.values())
    budget = clock(found.rehearsal.plan.budget_seconds)
    return f"{found.recipe}, {budget}: measured here, {rates}\n{tried}."


def _ladder(found: Preview | RecipePreview) -> Table:
    plan = found.rehearsal.plan
    rates = plan.reference_rates
    rows = []
    for rung, seconds in enumerate(plan.ladder):
        name = "full run" if rung == plan.top_rung else f"rung {rung}"
        tokens = [f"{seconds * rate:,.0f}" for rate in rates.values()]
        rows.append([name, clock(seconds), *tokens, str(found.rehearsal.trials[rung])])
    tokens = ["units"] if isinstance(found, RecipePreview) else [f"tokens, {name}" for name in rates]
    return table_of("The ladder", ["rung", "training", *tokens, "trials expected"], rows)


def _phases(found: Preview | RecipePreview) -> Table:
    rows = [[phase.name, clock(phase.start), clock(phase.seconds)] for phase in found.rehearsal.phases]
    budget = found.rehearsal.plan.budget_seconds
    rows.append(["deadline", clock(budget), f"{clock(budget - found.rehearsal.spent_seconds)} before it"])
    return table_of("When each part begins", ["part", "begins after", "takes"], rows)


def _fits(found: Preview) -> list[RenderableType]:
    if not found.fits:
        return [Text("What fits was measured, for this shape cannot be foreseen.")]
    heads = ["quantization", "rank", *(f"micro-batch {cell.micro_batch}" for cell in found.fits[0].cells)]
    rows: list[list[str | Text]]
    rows = [[row.quantization, str(row.rank), *map(_cell, row.cells)] for row in found.fits]
    table = table_of(f"What fits, with rows of {found.longest} tokens", heads, rows)
    legend = "GiB at the peak of a step; green fits, (c): with gradient checkpointing, red does not."
    return [table, Text(legend)]


def _cell(cell: FitCell) -> Text:
    mark = " (c)" if cell.recompute and cell.fits else ""
    no = "" if cell.fits else " no"
    return Text(f"{cell.bytes / GIB:.1f}{mark}{no}", style="green" if cell.fits else "red")


def _speed(found: Preview) -> Table:
    rows = [
        [
            c.quantization,
            str(c.rank),
            str(c.micro_batch),
            "yes" if c.recompute else "no",
            f"{c.tokens_per_second:,.0f}",
        ]
        for c in found.calibrations.values()
        if c.status == "ok"
    ]
    heads = ["quantization", "largest rank", "micro-batch", "checkpointing", "tokens/s"]
    return table_of("How it would train", heads, rows)


def _refused(found: Preview) -> list[Text]:
    gone = [c for c in found.calibrations.values() if c.status != "ok"]
    return [Text(f"{c.quantization} is left out: {c.detail}", style="yellow") for c in gone]


def _reserve(found: Preview) -> Table:
    title = f"The reserve, {clock(found.rehearsal.plan.reserve_seconds)}: kept until the end"
    rows = [[name, f"{seconds:.1f}"] for name, seconds in found.reserve.items()]
    return table_of(title, ["for", "seconds"], rows)


def _disk(found: Preview) -> str:
    run, cache = found.disk["run"], found.disk["cache"]
    if run is None:
        here = "Disk: the run folder's need is not known for this shape"
    else:
        most, least = run["most_bytes"] / GIB, run["least_bytes"] / GIB
        here = f"Disk: {most:.2f} GiB in the run folder at most, {least:.2f} GiB at least"
    added = [f"{what} {'unknown' if n is None else f'{n / GIB:.2f} GiB'}" for what, n in cache.items()]
    return f"{here}; in the cache {', '.join(added)}."


def _guesses(found: Preview | BasesPreview) -> Table:
    rows = [[guess.what, guess.value, guess.source] for guess in found.guesses]
    return table_of("What this rests on", ["what", "assumed", "from"], rows, left=("assumed", "from"))
