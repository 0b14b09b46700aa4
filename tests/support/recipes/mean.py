"""A recipe as small as can be: a number that learns to be 3. What goes wrong with it is asked for by name."""

import json
import os
import time

import budgetsearch as bs


class Mean(bs.Recipe):
    """Trains in no time; ``trouble`` in its configuration says what shall go wrong."""

    unit, metric = "steps", "squared error"
    space = {
        "dimensions": {
            "rate": {"kind": "float", "low": 0.001, "high": 0.1, "log": True},
            "noise": {"kind": "float", "low": 0.0, "high": 0.1},
        }
    }
    pause = 0.002
    """Seconds of a step."""

    def start(self, params, seed):
        return {"value": 0.0, "params": dict(params), "seed": seed}

    def train(self, trial, units, until, course):
        trouble = trial["params"].get("trouble", "")
        for step in range(units, until):
            if course.should_stop():
                return step
            time.sleep(self.pause)
            trial["value"] += trial["params"]["rate"] * course.rate(step) * (3.0 - trial["value"])
        if trouble == "nan":
            trial["value"] = float("nan")
        if trouble == "memory":
            raise MemoryError("no room")
        if trouble == "float":
            raise FloatingPointError("overflow")
        if trouble == "back":
            return units - 1
        if trouble == "hang":
            time.sleep(3600)
        if trouble == "die":
            os._exit(1)
        course.tell(until, (3.0 - trial["value"]) ** 2)
        return until

    def evaluate(self, trial):
        return [(3.0 - trial["value"]) ** 2 + trial["params"]["noise"] * k for k in range(4)]

    def save(self, trial, folder):
        (folder / "mean.json").write_text(json.dumps(trial))

    def load(self, params, seed, folder):
        return json.loads((folder / "mean.json").read_text())


class Exported(Mean):
    """What it hands out is another thing than what it saves; it has a second metric."""

    second_metric, second_direction = "distance", "min"

    def second(self, trial):
        return abs(3.0 - trial["value"])

    def export(self, trial, folder):
        (folder / "answer.txt").write_text(f"{trial['value']:.6f}")


class Forgetful(Mean):
    """Its checkpoints lose something."""

    def load(self, params, seed, folder):
        return {**super().load(params, seed, folder), "value": 0.0}


class Restless(Mean):
    """It evaluates differently each time."""

    def evaluate(self, trial):
        trial["value"] += 0.1
        return super().evaluate(trial)


class Secondless(Mean):
    """Its second metric is no number, and in an unknown direction."""

    second_metric = "praise"

    def second(self, trial):
        return "very good"


class Foldered(Mean):
    """It writes a folder."""

    def save(self, trial, folder):
        (folder / "inner").mkdir()


class Silent(Mean):
    """It evaluates to no number."""

    def evaluate(self, trial):
        return "good"


class Pickled(Mean):
    """It writes what must be unpickled."""

    def save(self, trial, folder):
        super().save(trial, folder)
        (folder / "state.pt").write_bytes(b"x")


class Incomplete(bs.Recipe):
    """It cannot train."""


class Broken(Mean):
    """It cannot be made."""

    def __init__(self):
        raise ValueError("no data here")


@bs.objective(space=Mean.space, most=400, unit="rounds", metric="distance")
def whole(params, budget):
    """A function that cannot pause."""
    time.sleep(0.002 * budget)
    return abs(3.0 - 3.0 * (1.0 - (1.0 - params["rate"]) ** budget))


no_recipe = 3
