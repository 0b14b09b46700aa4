"""The example in plain PyTorch, where something goes wrong that is asked for by name."""

import importlib.util
import os
import time
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[3] / "examples/recipes/digits.py"
spec = importlib.util.spec_from_file_location("plain_digits", EXAMPLE)
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)


class Digits(plain.Digits):
    """``trouble`` in its configuration says what shall go wrong, after it has trained."""

    def start(self, params, seed):
        return {**super().start(params, seed), "trouble": params.get("trouble", "")}

    def train(self, trial, units, until, course):
        super().train(trial, units, until, course)
        trouble = trial["trouble"]
        if trouble == "nan":
            with torch.no_grad():
                next(trial["net"].parameters()).fill_(float("nan"))
        if trouble == "memory":
            torch.empty(10**15)
        if trouble == "back":
            return units - 1
        if trouble == "hang":
            time.sleep(3600)
        if trouble == "die":
            os._exit(1)
        return until
