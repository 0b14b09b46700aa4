"""Segments of the tiny model, trained for real."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from budgetsearch.core.records import Schedule, Segment, SegmentResult
from budgetsearch.training.bases import load_base
from budgetsearch.training.members import Shop
from budgetsearch.training.recipe import train_gang

PARAMS = {"quantization": "fp32", "rank": 4, "alpha": 8, "learning_rate": 1e-2, "dropout": 0.1}


def make_segment(start: int = 0, stop: int = 1500, **changes: Any) -> Segment:
    """A segment of the trial under test."""
    segment = Segment(
        trial_id=3,
        params=PARAMS,
        seed=7,
        rung=0,
        start_tokens=start,
        stop_tokens=stop,
        schedule=Schedule(warmup_tokens=300, stop_tokens=3000, cooldown_tokens=600),
        batch_size=4,
        micro_batch=4,
    )
    return dataclasses.replace(segment, **changes)


def base(tiny_model: Path) -> Any:
    """A fresh base model."""
    return load_base(str(tiny_model), "fp32", "cpu")


def train(model: Any, segment: Segment, shop: Shop) -> SegmentResult:
    """Train one segment alone; the model is bare again afterwards."""
    (result,) = train_gang(model, [segment], shop, 8)
    return result
