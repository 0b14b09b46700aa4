"""Liger's kernels: used where they compile and change nothing, else the base is as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from budgetsearch.core.records import WorkerSetup
from budgetsearch.core.reports import Notice
from budgetsearch.training import fused
from budgetsearch.training.bases import load_base
from budgetsearch.training.workshop import Workshop

ROTATE = modeling_llama.apply_rotary_pos_emb


class Norm:
    """What the library's function computes."""

    @staticmethod
    def apply(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return fused._norm(x, x, weight)


class Swiglu:
    """Another one."""

    apply = staticmethod(fused._swiglu)


class Rope:
    """The third."""

    @staticmethod
    def apply(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return fused._rotated(q, k, cos[0], sin[0]).chunk(2)


class Library:
    """What is installed: how it goes about a model."""

    def __init__(self) -> None:
        self.factor, self.error = 1.0, ""

    def apply(self, model: Any, **options: Any) -> None:
        """Replace a function for all models, and a method of this one."""
        assert options == {"rope": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
        modeling_llama.apply_rotary_pos_emb = lambda *given, **rest: ROTATE(*given, **rest)
        norm = model.model.norm
        norm.forward = lambda x: self.factor * type(norm).forward(norm, x)
        if self.error:
            raise AttributeError(self.error)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """The stand-in for the library."""
    found = Library()
    for name, values in {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": Norm},
        "liger_kernel.ops.rope": {"LigerRopeFunction": Rope},
        "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": Swiglu},
        "liger_kernel.transformers": {"_apply_liger_kernel_to_instance": found.apply},
    }.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fused, "version", lambda: "0.8.5")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", ROTATE)
    fused.refused.cache_clear()
    yield found
    fused.refused.cache_clear()


@pytest.fixture
def base(tiny_model: Path) -> Any:
    """A base that wears none."""
    return load_base(str(tiny_model), "fp32", "cpu")


def test_kernels_that_change_nothing_are_worn(library: Library, base: Any) -> None:
    """The base says what it said, with them."""
    assert fused.fuse(base, "cpu") == ""
    assert modeling_llama.apply_rotary_pos_emb is not ROTATE
    assert "forward" in vars(base.model.norm)


@pytest.mark.parametrize(
    ("factor", "error", "words"),
    [(1.5, "", "change this model's logits"), (1.0, "no such part", "AttributeError: no such part")],
)
def test_a_base_that_they_do_not_fit_is_as_it_was(
    library: Library, base: Any, factor: float, error: str, words: str
) -> None:
    """Its methods and the function that all models of its kind share."""
    library.factor, library.error = factor, error
    before = fused._logits(base)
    assert words in fused.fuse(base, "cpu")
    assert modeling_llama.apply_rotary_pos_emb is ROTATE
    assert "forward" not in vars(base.model.norm)
    torch.testing.assert_close(fused._logits(base), before, rtol=0.0, atol=0.0)


def test_what_does_not_compile_or_is_wrong_is_not_used(
    library: Library, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out on a few numbers, before any base is touched."""
    right = Swiglu.apply

    def broken(*given: Any) -> Any:
        raise RuntimeError("\nFailed to find C compiler.\nPlease specify via CC")

    for wrong, words in ((broken, "Failed to find C compiler"), (lambda a, b: right(b, a), "swiglu is off")):
        monkeypatch.setattr(Swiglu, "apply", staticmethod(wrong))
        fused.refused.cache_clear()
        assert words in fused.fuse(base, "cpu")
        assert modeling_llama.apply_rotary_pos_emb is ROTATE


def test_the_user_hears_once_that_installed_kernels_are_not_used(
    setup: WorkerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing where there are none: that is the doctor's to recommend."""
    said: list[Any] = []
    workshop = Workshop(setup, said.append, lambda job_id: False)
    try:
        workshop.bases._plainly("liger-kernel is not installed")
        monkeypatch.setattr(fused, "version", lambda: "0.8.5")
        for _ in range(2):
            workshop.bases._plainly("they do not work here")
    finally:
        workshop.close()
    assert [one.text.split(":")[0] for one in said if isinstance(one, Notice)] == ["liger-kernel is not used"]
