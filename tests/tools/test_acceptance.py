"""The script for the first minutes on a card runs to its end without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import acceptance


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
    way = acceptance.Way(rows=2, width=32)
    assert acceptance.measured(acceptance.Check("cpu", "tiny", "bf16", 0.0), way)["tokens_per_second"] > 0
