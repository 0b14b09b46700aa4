"""What ``budgetsearch compare`` does, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

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
    say: Callable[[str], None] = lambda line: None,
    tick: Tick = lambda what, done, total: None,
) -> Comparison:
    """Compare runs from their ledgers; with ``tasks`` their adapters and bases are asked as well.

    When it is interrupted while it asks, what has been answered is kept and compared.

    Raises:
        UsageError: a folder is not a run, or an option cannot be used.
        BudgetsearchError: a task cannot be run.
    """
    tasks.check()
    runs = gather([*paths, *([baseline] if baseline else [])])
    against = next(
        (run.name for run in runs if baseline and Path(run.path).resolve() == baseline.resolve()), None
    )
    if tasks.names is None:
        return compare_runs(runs, baseline=against)
    return _asked(runs, against, Asking(parse_tasks(tasks.names), tasks, cache, tick, say))


def _asked(runs: Sequence[Run], against: str | None, asking: Asking) -> Comparison:
    interrupted = False
    try:
        asking.ask([Subject.of(run) for run in runs], base_names(runs, [run.name for run in runs]))
    except KeyboardInterrupt:
        interrupted = True
    answers = {task: found for task, found in asking.answers.items() if found}
    return compare_runs(runs, answers, baseline=against, notes=asking.notes, interrupted=interrupted)
