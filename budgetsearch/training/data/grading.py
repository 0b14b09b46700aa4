"""When an answer to a row is right."""

from __future__ import annotations

import re

from budgetsearch.training.data import gym
from budgetsearch.training.data.conversation import Sample


def grading_of(sample: Sample) -> str:
    """How answers are graded: by the ``task``, or against the ``final`` or all ``text`` of the completion."""
    if sample.check is not None:
        return "task"
    return "final" if "####" in sample.answer else "text"


def answer_is_right(sample: Sample, answer: str) -> float:
    """Grade of an answer, 0 to 1: the task's own check, the number after ``####``, or equal text."""
    if sample.check is not None:
        return gym.grade(sample.check, answer)
    if grading_of(sample) == "final":
        return float("####" in answer and _final(sample.answer) == _final(answer))
    return float(_normal(sample.answer) == _normal(answer))


def _final(text: str) -> str:
    """The line after the last ``####``: a model that goes on writing has still answered."""
    line = text.rsplit("####", 1)[1].strip().partition("\n")[0]
    return re.sub(r"[,$\s]", "", line).rstrip(".").casefold()


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".,;:!? ")
