"""The script for the first minutes on a card runs to its end without one."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import acceptance
from benchmarks.gpu.ground import Drawn
from budgetsearch.machine.host import GIB


def test_every_section_goes_through_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code with a tiny shape; whole runs and the worker's steps have tests of their own. A section
    that breaks is an unmet want, and those after it go on."""

    def broken(check: acceptance.Check) -> dict[str, object]:
        raise ValueError("no")

    monkeypatch.setattr(acceptance, "SECTIONS", {"broken": broken, **acceptance.SECTIONS})
    names = "broken,plain_peft,widths,profile,losses,checkpoint,swap,less_memory,calibration"
    options = ["--device", "cpu", "--shape", "tiny", "--seconds", "0.01", "--only", names]
    assert 1 == acceptance.main([*options, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))
    assert ["broken goes through: ValueError: no"] == found["unmet"]
    assert set(names.split(",")) == set(found["seconds"])
    assert ["less_memory"] == [name for name in names.split(",") if "skipped" in found.get(name, {})]
    way = acceptance.Way(rows=2, width=32)
    assert acceptance.measured(acceptance.Check("cpu", "tiny", "bf16", 0.0), way)["tokens_per_second"] > 0


def test_the_run_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's profile has its rows from there, but whoever imports the trace may not ask it any more."""
    asked: list[list[str]] = []

    class Program:
        returncode, stderr, kill = 0, "", staticmethod(lambda: None)

        def __init__(self, program: list[str], **rest: object) -> None:
            asked.append(program)

        def wait(self, seconds: float = 0.0) -> int:
            return -9

    monkeypatch.setattr(acceptance.subprocess, "Popen", Program)
    monkeypatch.setattr(acceptance.subprocess, "run", Program)
    acceptance.a_run(acceptance.Check("cuda:0", "7b", "bf16", 0.0))
    run, again = asked
    assert run[run.index("--data") + 1].startswith("reasoning-gym:") and "--gpu" in run
    assert "resume" in again


@pytest.mark.parametrize(("gib", "rows"), [(139.8, 16), (79.2, 16), (39.4, 16), (23.6, 4), (14.6, 0)])
def test_a_smaller_card_is_given_fewer_rows(monkeypatch: pytest.MonkeyPatch, gib: float, rows: int) -> None:
    """A step of a 7B that an H200 takes whole would only run out of memory on 24 GB."""
    card = SimpleNamespace(total_memory=gib * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    check = acceptance.Check("cuda:0", "7b", "bf16", 0.0)
    way = acceptance.fitting(check, acceptance.Way())
    assert rows == (way.rows if way else 0)


@pytest.mark.parametrize("fused", ["yes", "they do not work here"])
def test_a_peak_below_the_estimate_is_wanted_to_be_so_with_fused_kernels_alone(
    monkeypatch: pytest.MonkeyPatch, fused: str
) -> None:
    """The estimate does not count on them, and they keep less."""
    check, way = acceptance.Check("cpu", "tiny", "bf16", 0.0), acceptance.Way(rows=2, width=32)
    foreseen = acceptance.foreseen(check, way).allocated
    check.found["fused kernels"] = fused
    monkeypatch.setattr(acceptance.Check, "on_card", property(lambda check: True))
    monkeypatch.setattr(acceptance, "stepping", lambda *args: nullcontext(lambda: None))
    monkeypatch.setattr(acceptance, "wait", lambda check: None)
    monkeypatch.setattr(acceptance.memory, "peak_bytes", lambda device: 0.8 * foreseen)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    acceptance.measured(check, way)
    assert (fused == "yes") == (not check.unmet)


def test_rows_are_drawn_and_the_same_each_time() -> None:
    """Of one token repeated the loss is near zero after a dozen steps, where nothing can be compared."""
    rows = Drawn([64], 300)
    (ids, trained), (again, _) = rows.row(0), rows.row(0)
    assert list(ids) == list(again) and len(set(ids)) > 32 and max(ids) < 300
    assert sum(trained) == rows.targets(0)
