"""Where trials may cut the training rows at lengths of their own: the dimension ``max_length`` of a space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from budgetsearch.core.errors import DataError
from budgetsearch.core.space.space import Space
from budgetsearch.run.settings import Settings

if TYPE_CHECKING:
    from budgetsearch.training.data.tokens import PreparedData

LENGTH = "max_length"


def with_longest(settings: Settings, space: Space) -> Settings:
    """Rows are prepared for the longest that a trial may have; validation rows are those of all trials."""
    return settings.model_copy(update={LENGTH: int(space.largest(LENGTH, settings.max_length))})


def lengths_of(space: Space) -> list[int]:
    """Those that trials may have, ascending; of a range its ends and its middle; none: all have the run's."""
    return sorted(int(value) for value in space.values_of(LENGTH)) if LENGTH in space.named else []


def length_shares(data: PreparedData, space: Space) -> tuple[tuple[int, float], ...]:
    """What is left of the training tokens at each of them: see ``Plan.length_shares``.

    Raises:
        DataError: at one of them nothing.
    """
    whole, longest = data.train_stats.tokens, data.train_stats.max_row_tokens
    found = tuple((length, int(data.train_to(length).lengths.sum()) / whole) for length in lengths_of(space))
    if found and not found[0][1]:
        raise DataError(
            f"{LENGTH} {found[0][0]} in the search space: no training row has an answer that begins before "
            f"that token; give a larger one (the longest row has {longest} tokens)"
        )
    return found
