"""LCBench as continuous curves: the YAHPO Gym surrogate (Pfisterer et al. 2022) answers for any point.

Takes the folder with ``model.onnx`` and ``encoding.json`` of slds-lmu/yahpo_data and tables of sampled
configurations (``TASK.npz``), whose best and median values define the regret. Needs onnxruntime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from budgetsearch.core.records import Params
from budgetsearch.tools.simulate.curves import Array, CurveTable, load, space_of

EPOCHS = 50


class Surrogate:
    """Continuous curves of one OpenML task; see the protocol ``Curves``."""

    def __init__(self, folder: Path, task: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._code = json.loads((folder / "encoding.json").read_text())["OpenML_task_id"][task]
        table: CurveTable = load(folder / f"{task}.npz")
        self.name, self.points, self.own_lengths = f"lcbench-{task}", EPOCHS, False
        self.count = 1_000_000  # in effect without end
        self.mean_cost, self.point_cost = table.mean_cost, table.point_cost
        self.median, self.worst = table.median, 0.0  # no accuracy is below zero
        self._dimensions: Mapping[str, Mapping[str, Any]] = table.dimensions
        best = folder / f"opt_{task}.txt"
        self.best = min(table.best, -float(best.read_text())) if best.is_file() else table.best

    @property
    def space(self) -> dict[str, Any]:
        """The search space as ``Space.parse`` reads it."""
        return space_of(self.name, self._dimensions)

    def nearest(self, params: Params, taken: set[int]) -> tuple[Params, int]:
        """The configuration itself: every one can be run."""
        return params, len(taken)

    def left(self, taken: set[int]) -> bool:
        """There is always another one."""
        return True

    def curve(self, params: Params) -> tuple[Array, Array]:
        """Seconds, and the negative validation accuracy, after each of 50 epochs."""
        rows = np.array(
            [[epoch, *(params[name] for name in self._dimensions)] for epoch in range(1, EPOCHS + 1)]
        )
        found = self._session.run(
            None,
            {
                "x_cat": np.full((EPOCHS, 1), self._code, np.int32),
                "x_cont": rows.astype(np.float32),
            },
        )[0]
        seconds = np.maximum.accumulate(np.maximum(found[:, 0], 1e-3))
        return seconds.astype(float), -np.clip(found[:, 1], 0, 100).astype(float)
