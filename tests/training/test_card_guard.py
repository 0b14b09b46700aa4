"""The real training step on fake CUDA tensors of a 7B's shape: devices, types, waits, kernels, memory.

All of it runs in one process of its own (tests/support/card_faults.py), where every mended fault is put back
once as well: a guard that does not see it guards nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.card_faults import CHECKS, FAULTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """What is wrong with each check, and with each fault."""
    program = [sys.executable, "-m", "tests.support.card_faults"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: wrong for line in done.stdout.splitlines() for name, wrong in json.loads(line).items()}


@pytest.mark.parametrize("name", CHECKS)
def test_a_step_on_a_card_is_as_planned(found: dict[str, list[str]], name: str) -> None:
    """No CPU tensor meets a CUDA tensor, products are in 16 bits, one wait a step and none a pass, no more
    kernels a layer than stated, and the whole model's peak within 5% of what is foreseen."""
    assert [] == found[name]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_was_mended_is_seen_when_it_is_put_back(found: dict[str, list[str]], name: str) -> None:
    """The check says what is wrong, and in which respect."""
    *_, words = FAULTS[name]
    assert any(said.startswith(words) for said in found[name]), found[name]
