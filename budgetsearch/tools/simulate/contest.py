"""Many plays of the policy and of random search, and what comes of them: regret, error, rank, course."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scipy.stats import rankdata

from budgetsearch.core.errors import UsageError
from budgetsearch.machine import child
from budgetsearch.tools.simulate.curves import Curves, load
from budgetsearch.tools.simulate.play import play, play_random
from budgetsearch.tools.simulate.world import Trace

OURS = "budgetsearch"
PLAYERS: dict[str, Callable[[Curves, float, int], Trace]] = {OURS: play, "random": play_random}
"""By name: what each sees of curves within so many mean full runs, with a seed."""
MOMENTS = 100
"""Points of a plotted line."""


@dataclass(frozen=True)
class Outcome:
    """One method on one table with one seed and one budget."""

    curves: str
    method: str
    seed: int
    multiple: float
    """The budget in mean full runs."""
    regret: float
    """Normalised, 0 (the best there is) to 1 (no better than the median configuration)."""
    course: tuple[float, ...]
    """Normalised regret at equal steps up to the budget."""


@dataclass(frozen=True)
class Standing:
    """One method over all tables and seeds."""

    method: str
    regrets: dict[float, tuple[float, float]]
    """By budget: mean and standard error of the regret, over the seeds."""
    rank: float
    """Mean over tables and budgets of its place among the methods, by mean regret."""


@dataclass(frozen=True)
class Task:
    """One play of one method."""

    path: str
    method: str
    seed: int
    multiple: float


def read_budgets(text: str) -> list[float]:
    """``4x,10x`` as numbers of mean full runs.

    Raises:
        UsageError: something else is written there.
    """
    try:
        found = [float(part.strip().lower().removesuffix("x")) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(x) and x >= 1 for x in found):
        raise UsageError(f"--budget takes numbers of full runs, 1x or more, such as 4x,10x; not {text!r}.")
    return found


def find_tables(paths: Sequence[Path]) -> list[Path]:
    """The tables that are named, and those of the folders that are named.

    Raises:
        UsageError: there is none, or two have the same name.
    """
    found = [f for p in paths for f in (sorted(p.rglob("*.npz")) if p.is_dir() else [p])]
    if not found:
        raise UsageError(f"There are no .npz files in {', '.join(map(str, paths))}.")
    names = [path.stem for path in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"Two tables are called {', '.join(twice)}; give them different names.")
    return found


def compete(
    paths: Sequence[Path],
    multiples: Sequence[float],
    seeds: int,
    jobs: int | None = None,
    tell: Callable[[int, int], None] = lambda done, all_: None,
) -> list[Outcome]:
    """Play every method on every table; ``tell`` hears how many of the plays are done.

    Raises:
        DataError: a table cannot be read.
        InvariantError: our own policy broke a promise.
    """
    for path in paths:
        load(path)  # a broken table is told before the first play
    tasks = [
        Task(str(path), method, seed, multiple)
        for seed, path, multiple, method in product(range(seeds), paths, multiples, PLAYERS)
    ]
    found: dict[Task, Outcome] = {}
    for done, (task, outcome) in enumerate(_run_all(tasks, jobs), start=1):
        found[task] = outcome
        tell(done, len(tasks))
    return [found[task] for task in tasks]


def _run_all(tasks: Sequence[Task], jobs: int | None) -> Iterator[tuple[Task, Outcome]]:
    workers = jobs or os.cpu_count() or 1
    if workers == 1 or len(tasks) == 1:
        yield from ((task, _play(task)) for task in tasks)
        return
    # Small matrices: one thread each is faster than all threads for every process.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ[child.SAFE_PATH] = "1"
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        under_way = {pool.submit(_play, task): task for task in tasks}
        for future in as_completed(under_way):
            yield under_way[future], future.result()


@lru_cache(maxsize=8)
def _table(path: str) -> Curves:
    return load(Path(path))


def _play(task: Task) -> Outcome:
    curves = _table(task.path)
    trace = PLAYERS[task.method](curves, task.multiple, task.seed)
    return read_off(curves, trace, task.method, task.seed, task.multiple)


def read_off(curves: Curves, trace: Trace, method: str, seed: int, multiple: float) -> Outcome:
    """What a play was worth at a budget; its own one may have been larger."""
    deadline = multiple * curves.mean_cost
    course = tuple(trace.regret(curves, deadline * k / MOMENTS) for k in range(1, MOMENTS + 1))
    return Outcome(curves.name, method, seed, multiple, course[-1], course)


def standings(outcomes: Sequence[Outcome]) -> list[Standing]:
    """The methods, best average rank first."""
    methods = list(dict.fromkeys(o.method for o in outcomes))
    played = {m: sorted({o.multiple for o in outcomes if o.method == m}) for m in methods}
    ranks = _ranks(outcomes, methods)
    found = [
        Standing(m, {x: _mean_and_error(outcomes, m, x) for x in played[m]}, statistics.fmean(ranks[m]))
        for m in methods
    ]
    return sorted(found, key=lambda standing: standing.rank)


def _mean_and_error(outcomes: Sequence[Outcome], method: str, multiple: float) -> tuple[float, float]:
    """Over seeds: a seed's regret is its mean over the tables."""
    by_seed: dict[int, list[float]] = {}
    for o in outcomes:
        if o.method == method and o.multiple == multiple:
            by_seed.setdefault(o.seed, []).append(o.regret)
    means = [statistics.fmean(regrets) for regrets in by_seed.values()]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return statistics.fmean(means), error


def _ranks(outcomes: Sequence[Outcome], methods: Sequence[str]) -> dict[str, list[float]]:
    """Each method's place (1 is best, ties share) on every table at every budget."""
    cells: dict[tuple[str, float], dict[str, list[float]]] = {}
    for o in outcomes:
        cells.setdefault((o.curves, o.multiple), {}).setdefault(o.method, []).append(o.regret)
    ranks: dict[str, list[float]] = {method: [] for method in methods}
    for cell in cells.values():
        means = {method: statistics.fmean(regrets) for method, regrets in cell.items()}
        for method, rank in zip(means, rankdata(list(means.values())), strict=True):
            ranks[method].append(float(rank))
    return ranks


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Standings and single outcomes (without their courses), ready for ``json.dumps``."""
    table = [
        {
            "method": s.method,
            "average_rank": s.rank,
            "regret": {
                f"{x:g}x": {"mean": mean, "standard_error": None if math.isnan(error) else error}
                for x, (mean, error) in s.regrets.items()
            },
        }
        for s in standings(outcomes)
    ]
    runs = [{k: v for k, v in asdict(o).items() if k != "course"} for o in outcomes]
    return {"standings": table, "runs": runs}
