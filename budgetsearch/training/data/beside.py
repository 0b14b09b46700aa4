"""What stands beside the turns of a row and says that they must not be learned as they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from budgetsearch.training.data.conversation import Conversation, Skip
from budgetsearch.training.data.messages import value_of

Row = Mapping[str, Any]

UNWANTED = ("label", "kto_tag")
"""False in preference data that have one answer a row."""
PREFERENCES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
CHOICES = ("choices", "options")
"""What a question leaves to choose from; an answer may be nothing but a number of it."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
MARK = re.compile(r"<(image|video|audio)>")
"""Stands in a text for what is to be seen or heard there."""


def check_label(row: Row, given: Collection[str]) -> frozenset[str]:
    """The columns that say whether the answer is a good one; ``given``: those that hold something else.

    Raises:
        Skip: it is none.
    """
    said = {name: str(row[name]).strip().casefold() for name in UNWANTED if name in row and name not in given}
    for name, value in said.items():
        if value == "false":
            raise Skip(f"{name!r} is false: preference data, and this is no answer to learn")
    return frozenset(name for name, value in said.items() if value == "true")


def preferences(row: Row, prompt: str = "") -> str:
    """What to say of a row of preference data; nothing of another. ``prompt``: where its question is."""
    if isinstance(asked := row.get("input"), Mapping) and "messages" in asked:
        prompt = "input.messages"
    for better, worse in PREFERENCES:
        if better in row and worse in row:
            given = f"prompt={prompt}," if prompt else ""
            return (
                f"{better} and {worse} are preference data, which this loss does not learn from; to train on "
                f"the {'chosen' if better == 'chosen' else 'preferred'} answers alone give --columns "
                f"{given}completion={better}"
            )
    return ""


def check_choices(row: Row, prompt: str) -> None:
    """Nothing to choose from may be left out.

    Raises:
        Skip: it would be.
    """
    for name in CHOICES:
        if isinstance(row.get(name), (list, tuple, Mapping)) and row[name]:
            raise Skip(
                f"the question would stand without its {name!r}; write them into {prompt!r}, or name the "
                "columns with --columns to leave them out"
            )


def check_media(row: Row, talk: Conversation, given: Collection[str]) -> None:
    """Nothing to see or hear may be left out; a plain text, such as an address, may be, where no turn shows
    its place.

    Raises:
        Skip: it would be.
    """
    marked = any(MARK.search(turn.content) for turn in talk.turns)
    for name in _filled(row, MEDIA):
        if marked or not (isinstance(row[name], str) or given):
            raise Skip(f"{name!r} belongs to it; only text can be trained")


def _filled(row: Row, columns: Iterable[str]) -> Iterable[str]:
    return (name for name in columns if value_of(row, name) is not None)
