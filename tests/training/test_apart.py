"""The encoder in a process of its own finds what this process names."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from budgetsearch.core.errors import DataError
from budgetsearch.training.data.apart import EncoderApart


def test_a_relative_path_is_meant_from_here(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process stands in a neutral folder, where nothing imports what lies about."""
    monkeypatch.chdir(tiny_model.parent)
    with closing(EncoderApart(Path(tiny_model.name))) as encoder:
        assert encoder.ids("Ada")
    with pytest.raises(DataError, match="is ending"):
        encoder.ids("Bob")  # nothing begins it again
