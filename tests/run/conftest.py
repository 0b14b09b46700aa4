"""A run folder with checkpoints, for the tests of exports and of lost checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.exporting import House
from tests.support.factories import Story, whole_run


@pytest.fixture
def house(tmp_path: Path) -> House:
    """An empty run."""
    return House(tmp_path)


@pytest.fixture
def story(house: House) -> Story:
    """A whole run whose checkpoints are on disk."""
    story = whole_run()
    for _, result in story.history.results:
        if result.checkpoint_out:
            house.checkpoint(result.checkpoint_out)
    return story
