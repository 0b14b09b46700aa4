"""Calibrations that are kept: used again where they hold, and never believed where they do not."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.records import Calibration, Probe
from budgetsearch.storage.calibrations import KeptCalibrations

FOUND = Calibration(
    quantization="nf4",
    status="ok",
    tokens_per_second=100.0,
    eval_seconds_per_example=0.1,
    checkpoint_seconds=0.5,
    load_seconds=20.0,
    micro_batch=4,
    rank=16,
    gang=2,
    probes=(Probe(1, 4, False, 64, 100.0, 900), Probe(2, 4, False, 64, 150.0, 1000)),
    peak_bytes=1000,
    seconds={"load": 20.0, "train": 40.0},
)
BUDGET = 600.0


def kept(folder: Path, **changes: Any) -> KeptCalibrations:
    """Those of a run that has one condition."""
    values: dict[str, Any] = {"folder": folder, "of": {"ranks": (4, 16)}, "budget_seconds": BUDGET}
    return KeptCalibrations(**{**values, **changes})


def file_of(folder: Path) -> Path:
    """The one file that was written."""
    (path,) = folder.iterdir()
    return path


def test_a_kept_calibration_is_found_again_with_its_date(tmp_path: Path) -> None:
    """Everything is as it was measured; only when that was is added."""
    kept(tmp_path / "new").keep(FOUND)
    found = kept(tmp_path / "new").find("nf4")
    assert found is not None
    assert found.measured.startswith(time.strftime("%Y-"))
    assert replace(found, measured="") == FOUND


@pytest.mark.parametrize(
    "changes",
    [
        {"of": {"ranks": (4, 32)}},
        {"fresh": True},
        {"budget_seconds": 100 * BUDGET},
        {"limit_bytes": 999},
        {"limit_bytes": 2000},
    ],
    ids=str,
)
def test_it_holds_only_where_it_was_measured(changes: dict[str, Any], tmp_path: Path) -> None:
    """Not under other conditions, where there is ample time to measure anew, or with other memory."""
    kept(tmp_path, limit_bytes=1000).keep(FOUND)
    assert kept(tmp_path, limit_bytes=1000).find("nf4") is not None
    assert kept(tmp_path, **{"limit_bytes": 1000, **changes}).find("nf4") is None
    assert kept(tmp_path, limit_bytes=1000).find("fp32") is None


def test_a_somewhat_longer_budget_does_not_pay_for_it_twice(tmp_path: Path) -> None:
    """A minute of measuring is much of twenty minutes, and little of an hour."""
    kept(tmp_path).keep(FOUND)
    assert kept(tmp_path, budget_seconds=1100.0).find("nf4") is not None
    assert kept(tmp_path, budget_seconds=3600.0).find("nf4") is None


@pytest.mark.parametrize("days", [15, -1])
def test_an_old_one_is_measured_anew(days: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that claims to come from the future."""
    kept(tmp_path).keep(FOUND)
    later = time.time() + days * 86_400
    monkeypatch.setattr("time.time", lambda: later)
    assert kept(tmp_path).find("nf4") is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens_per_second", -1.0),
        ("tokens_per_second", "100"),
        ("tokens_per_second", 0.0),
        ("load_seconds", -3.0),
        ("micro_batch", 0),
        ("micro_batch", 1.5),
        ("gang", 64),
        ("status", "fine"),
        ("quantization", "fp32"),
    ],
)
def test_what_cannot_have_been_measured_is_not_believed(field: str, value: Any, tmp_path: Path) -> None:
    """A file that somebody changed is as good as none."""
    kept(tmp_path).keep(FOUND)
    written = json.loads(file_of(tmp_path).read_text(encoding="utf-8"))
    written["calibration"][field] = value
    file_of(tmp_path).write_text(json.dumps(written), encoding="utf-8")
    assert kept(tmp_path).find("nf4") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 2}', "NaN"])
def test_a_torn_file_is_as_good_as_none(text: str, tmp_path: Path) -> None:
    """Nothing is raised, and the next one is written over it."""
    kept(tmp_path).keep(FOUND)
    file_of(tmp_path).write_text(text, encoding="utf-8")
    assert kept(tmp_path).find("nf4") is None
    kept(tmp_path).keep(FOUND)
    assert kept(tmp_path).find("nf4") is not None


def test_what_no_plan_can_rest_on_is_not_kept(tmp_path: Path) -> None:
    """Failures may have passed by the next time."""
    kept(tmp_path).keep(replace(FOUND, status="crashed"))
    kept(tmp_path).keep(replace(FOUND, tokens_per_second=math.nan))
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    """The run goes on all the same."""
    (tmp_path / "file").touch()
    kept(tmp_path / "file" / "below").keep(FOUND)
    assert os.listdir(tmp_path) == ["file"]
