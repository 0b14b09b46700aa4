"""What ``budgetsearch compare`` does, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from budgetsearch.core.errors import UsageError
from budgetsearch.tools.compare.ask import Asking, Questions, Subject, Tick
from budgetsearch.tools.compare.comparison import Comparison, compare_runs
from budgetsearch.tools.compare.gather import gather
from budgetsearch.tools.compare.pairing import Run, base_names
from budgetsearch.tools.compare.tasks import parse_tasks


def compare(
    paths: Sequence[Path],
    *,
    cache: Path,
    tasks: str | None = None,
    limit: int | None = None,
    task_data: Path | None = None,
    chat_template: bool = False,
    trust_remote_code: bool = False,
    gpu: str | None = None,
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
    if tasks is None and (limit is not None or task_data or chat_template or trust_remote_code or gpu):
        raise UsageError(
            "--limit, --task-data, --chat-template, --trust-remote-code and --gpu belong to --tasks; name "
            "tasks too."
        )
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be 1 or more; it is {limit}.")
    if task_data is not None and not task_data.is_dir():
        raise UsageError(f"--task-data {task_data} is not a folder; it holds task definitions of lm-eval.")
    runs = gather([*paths, *([baseline] if baseline else [])])
    against = next((run.name for run in runs if baseline and _same(Path(run.path), baseline)), None)
    if tasks is None:
        return compare_runs(runs, baseline=against)
    questions = Questions(parse_tasks(tasks), limit, task_data, chat_template, gpu, trust_remote_code)
    return _asked(runs, against, Asking(questions, cache, tick, say))


def _asked(runs: Sequence[Run], against: str | None, asking: Asking) -> Comparison:
    interrupted = False
    try:
        asking.ask([Subject.of(run) for run in runs], base_names(runs, [run.name for run in runs]))
    except KeyboardInterrupt:
        interrupted = True
    answers = {task: found for task, found in asking.answers.items() if found}
    return compare_runs(runs, answers, baseline=against, notes=asking.notes, interrupted=interrupted)


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
