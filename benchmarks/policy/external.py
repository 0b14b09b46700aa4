"""Schedulers of other packages on the clock of ``benchmarks.policy.peers``.

They install from PyPI into an environment of their own (``requirements.txt`` here). Each is driven through
its public ask-and-tell interface with its defaults; a paused configuration goes on for the added time only.
"""

from __future__ import annotations

import datetime
import logging
import random
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.policy.peers import ETA, SMALLEST, Clockwork, OutOfBudget, Peer, Run, rungs_of

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)


def _dimensions(clock: Clockwork) -> list[dict[str, Any]]:
    return list(clock.curves.space["dimensions"])


class _Paused:
    """Runs by configuration, so that a package that names one again resumes it."""

    def __init__(self, clock: Clockwork) -> None:
        self._clock = clock
        self._runs: dict[str, Run] = {}

    def to(self, params: Mapping[str, Any], point: float) -> float:
        """The value of a configuration at a point."""
        plain = {d["name"]: _plain(d, params[d["name"]]) for d in _dimensions(self._clock)}
        key = repr(sorted(plain.items()))
        if key not in self._runs:
            self._runs[key] = self._clock.start(plain)
        run = self._runs[key]
        wanted = max(1, round(point))
        if wanted <= run.at:
            return run.value
        return run.advance(wanted)[0]


def _plain(dimension: Mapping[str, Any], value: Any) -> Any:
    if dimension["kind"] == "choice":
        return next(v for v in dimension["values"] if str(v) == str(value))
    return int(value) if dimension["kind"] == "int" else float(value)


# ------------------------------------------------------------------------- Syne Tune


def _syne_tune(name: str) -> Peer:
    def peer(clock: Clockwork, seed: int) -> None:
        import numpy as np
        import syne_tune.optimizer.baselines as baselines
        from syne_tune.backend.trial_status import Trial
        from syne_tune.config_space import choice, lograndint, loguniform, randint, uniform

        numbers = {("int", True): lograndint, ("int", False): randint}
        numbers |= {("float", True): loguniform, ("float", False): uniform}
        space = {
            d["name"]: choice(d["values"])
            if d["kind"] == "choice"
            else numbers[d["kind"], d["log"]](d["low"], d["high"])
            for d in _dimensions(clock)
        }
        np.random.seed(seed)
        points = clock.curves.points
        rungs = rungs_of(points)
        scheduler = getattr(baselines, name)(
            space, metric="loss", do_minimize=True, time_attr="epoch", max_t=points,
            grace_period=rungs[0], reduction_factor=ETA, random_seed=seed,
        )  # fmt: skip
        trials: dict[int, Any] = {}
        runs: dict[int, Run] = {}
        while True:
            suggestion = scheduler.suggest()
            if suggestion is None:
                raise OutOfBudget
            if suggestion.spawn_new_trial_id:
                number = len(trials)
                trials[number] = Trial(number, suggestion.config, datetime.datetime.now())
                scheduler.on_trial_add(trials[number])
                runs[number] = clock.start(suggestion.config)
            else:
                number = suggestion.checkpoint_trial_id
            _until_paused(scheduler, trials[number], runs[number], rungs)

    return peer


def _until_paused(scheduler: Any, trial: Any, run: Run, rungs: list[int]) -> None:
    for rung in [r for r in rungs if r > run.at]:
        value, over, _ = run.advance(rung)
        epoch = rungs[-1] if over else rung
        answer = scheduler.on_trial_result(trial, {"loss": value, "epoch": epoch})
        if over:
            scheduler.on_trial_complete(trial, {"loss": value, "epoch": epoch})
        if over or answer != "CONTINUE":
            return


# ---------------------------------------------------------------------- SMAC and DEHB


def _config_space(clock: Clockwork, seed: int) -> Any:
    from ConfigSpace import Categorical, ConfigurationSpace, Float, Integer

    space = ConfigurationSpace(seed=seed)
    for d in _dimensions(clock):
        if d["kind"] == "choice":
            space.add(Categorical(d["name"], d["values"]))
        else:
            kind = Integer if d["kind"] == "int" else Float
            space.add(kind(d["name"], (d["low"], d["high"]), log=d["log"]))
    return space


def _smac(clock: Clockwork, seed: int) -> None:
    from smac import MultiFidelityFacade, Scenario
    from smac.intensifier.hyperband import Hyperband
    from smac.runhistory.dataclasses import TrialValue

    points, paused = clock.curves.points, _Paused(clock)
    with tempfile.TemporaryDirectory() as folder:
        scenario = Scenario(
            _config_space(clock, seed), deterministic=True, n_trials=100_000, min_budget=points / SMALLEST,
            max_budget=points, seed=seed, output_directory=Path(folder),
        )  # fmt: skip
        facade = MultiFidelityFacade(
            scenario, lambda config, seed=0, budget=0: 0.0,
            intensifier=Hyperband(scenario, eta=ETA), overwrite=True, logging_level=50,
        )  # fmt: skip
        while True:
            info = facade.ask()
            value = paused.to(dict(info.config), info.budget)
            facade.tell(info, TrialValue(cost=value, time=0.1), save=False)


def _dehb(clock: Clockwork, seed: int) -> None:
    import loguru
    from dehb import DEHB

    loguru.logger.remove()
    points, paused = clock.curves.points, _Paused(clock)
    with tempfile.TemporaryDirectory() as folder:
        optimizer = DEHB(
            f=None, cs=_config_space(clock, seed), dimensions=len(_dimensions(clock)),
            min_fidelity=points / SMALLEST, max_fidelity=float(points), eta=ETA, n_workers=1, seed=seed,
            output_path=folder, save_freq="end", log_level="ERROR",
        )  # fmt: skip
        while True:
            job = optimizer.ask()
            before = clock.now
            value = paused.to(dict(job["config"]), job["fidelity"])
            optimizer.tell(job, {"fitness": value, "cost": clock.now - before})


# ------------------------------------------------------------------------------ NePS


def _priorband(clock: Clockwork, seed: int) -> None:
    import neps
    import numpy as np
    import torch
    from neps.space import HPOCategorical, HPOFloat, HPOInteger, SearchSpace

    torch.set_num_threads(1)
    np.random.seed(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    points, paused = clock.curves.points, _Paused(clock)
    space: dict[str, Any] = {}
    for d in _dimensions(clock):
        if d["kind"] == "choice":
            space[d["name"]] = HPOCategorical(choices=[str(v) for v in d["values"]])
        else:
            kind = HPOInteger if d["kind"] == "int" else HPOFloat
            space[d["name"]] = kind(lower=d["low"], upper=d["high"], log=d["log"])
    space["points_"] = HPOFloat(lower=points / SMALLEST, upper=float(points), is_fidelity=True)
    algorithm = neps.optimizers.algorithms.priorband(SearchSpace(space), eta=ETA)
    optimizer = neps.optimizers.ask_and_tell.AskAndTell(optimizer=algorithm)
    while True:
        trial = optimizer.ask()
        optimizer.tell(trial, paused.to(trial.config, trial.config["points_"]))


PEERS: dict[str, Peer] = {
    "syne-tune-asha": _syne_tune("ASHA"),
    "syne-tune-bohb": _syne_tune("BOHB"),
    "smac-hyperband": _smac,
    "dehb": _dehb,
    "neps-priorband": _priorband,
}
"""By the names that ``run.py --methods`` takes."""
