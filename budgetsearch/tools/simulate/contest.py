"""Many runs of many methods, and what comes of them: regret, error, rank, curves over time."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import UsageError, nearest
from budgetsearch.tools.simulate.curves import Curves, load
from budgetsearch.tools.simulate.peers import PEERS, play_peer
from budgetsearch.tools.simulate.play import play
from budgetsearch.tools.simulate.world import Trace

OURS = "budgetsearch"
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
    """One play of one method, and the budgets that it is read off at."""

    path: str
    method: str
    seed: int
    multiples: tuple[float, ...]


def tasks_for(
    paths: Sequence[Path],
    methods: Sequence[str],
    multiples: Sequence[float],
    seeds: int,
    sized: Sequence[str] = (OURS,),
) -> list[Task]:
    """What must be played. A peer does not know its deadline, so that its run with the largest budget
    holds the smaller ones; the ``sized`` methods use their budget, and are played for each."""
    found = []
    for seed in range(seeds):
        for path in paths:
            for method in methods:
                plays = [(x,) for x in multiples] if method in sized else [tuple(multiples)]
                found += [Task(str(path), method, seed, play) for play in plays]
    return found


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
    methods: Sequence[str],
    multiples: Sequence[float],
    seeds: int,
    jobs: int | None = None,
    tell: Callable[[int, int], None] = lambda done, all_: None,
) -> list[Outcome]:
    """Play every method on every table; ``tell`` hears how many of the runs are done.

    Raises:
        UsageError: a method is unknown.
        DataError: a table cannot be read.
        InvariantError: our own policy broke a promise.
    """
    for method in methods:
        if method not in (OURS, *PEERS):
            raise UsageError(
                f"There is no method {method!r}{nearest(method, list(PEERS))}; take {', '.join(PEERS)}."
            )
    for path in paths:
        load(path)  # a broken table is told before the first run
    tasks = tasks_for(paths, methods, multiples, seeds)
    found: list[Outcome] = []
    for done, outcomes in enumerate(_run_all(tasks, jobs), start=1):
        found += outcomes
        tell(done, len(tasks))
    names = [path.stem for path in paths]
    return sorted(
        found,
        key=lambda o: (o.seed, names.index(o.curves), multiples.index(o.multiple), methods.index(o.method)),
    )


def _run_all(tasks: Sequence[Task], jobs: int | None) -> Iterator[list[Outcome]]:
    workers = jobs or os.cpu_count() or 1
    if workers == 1 or len(tasks) == 1:
        yield from map(_play, tasks)
        return
    # Small matrices: one thread each is faster than all threads for every process.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_play, task) for task in tasks]):
            yield future.result()


@lru_cache(maxsize=8)
def _table(path: str) -> Curves:
    return load(Path(path))


def _play(task: Task) -> list[Outcome]:
    return outcomes_of(_table(task.path), task)


def outcomes_of(curves: Curves, task: Task) -> list[Outcome]:
    """One play of one method, read off at each budget of its task."""
    longest = max(task.multiples)
    ours = task.method == OURS
    trace = play(curves, longest, task.seed) if ours else play_peer(task.method, curves, longest, task.seed)
    return [_read_off(curves, trace, task, multiple) for multiple in task.multiples]


def _read_off(curves: Curves, trace: Trace, task: Task, multiple: float) -> Outcome:
    deadline = multiple * curves.mean_cost
    course = tuple(trace.regret(curves, deadline * k / MOMENTS) for k in range(1, MOMENTS + 1))
    return Outcome(curves.name, task.method, task.seed, multiple, course[-1], course)


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
        for method, mean in means.items():
            better = sum(1 for other in means.values() if other < mean - 1e-12)
            equal = sum(1 for other in means.values() if abs(other - mean) <= 1e-12)
            ranks[method].append(better + (equal + 1) / 2)
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
