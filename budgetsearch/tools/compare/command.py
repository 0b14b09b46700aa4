"""What ``budgetsearch compare`` does, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from budgetsearch.core.errors import UsageError
from budgetsearch.tools.compare.ask import Asking, Subject, Tick
from budgetsearch.tools.compare.comparison import Comparison, compare_runs
from budgetsearch.tools.compare.gather import gather
from budgetsearch.tools.compare.pairing import Run, base_names
from budgetsearch.tools.compare.tasks import Tasks, parse_tasks


def compare(
    paths: Sequence[Path],
    *,
    cache: Path,
    tasks: Tasks = Tasks(),  # noqa: B008  # frozen
    baseline: Path | None = None,
    price: float | None = None,
    say: Callable[[str], None] = lambda line: None,
    tick: Tick = lambda what, done, total: None,
) -> Comparison:
    """Compare runs from their ledgers; with ``tasks`` their adapters and bases are asked as well.

    ``price``: of an hour of the card, in any money. When it is interrupted while it asks, what has been
    answered is kept and compared.

    Raises:
        UsageError: a folder is not a run, or an option cannot be used.
        BudgetsearchError: a task cannot be run.
    """
    tasks.check()
    if price is not None and not 0 <= price < math.inf:
        raise UsageError(f"--price must be what an hour of the card costs, 0 or more; it is {price}.")
    runs = gather([*paths, *([baseline] if baseline else [])])
    against = next(
        (run.name for run in runs if baseline and Path(run.path).resolve() == baseline.resolve()), None
    )
    if tasks.names is None:
        return replace(compare_runs(runs, baseline=against), price=price)
    asking = Asking(parse_tasks(tasks.names), tasks, cache, tick, say)
    return replace(_asked(runs, against, asking), price=price)


def _asked(runs: Sequence[Run], against: str | None, asking: Asking) -> Comparison:
    interrupted = False
    try:
        asking.ask([Subject.of(run) for run in runs], base_names(runs, [run.name for run in runs]))
    except KeyboardInterrupt:
        interrupted = True
    answers = {task: found for task, found in asking.answers.items() if found}
    return compare_runs(runs, answers, baseline=against, notes=asking.notes, interrupted=interrupted)
