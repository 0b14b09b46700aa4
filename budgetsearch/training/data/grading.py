"""When an answer to a row is right."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

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


# -------------------------------------------------------------- metrics that answers are chosen by

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def _words(text: str) -> list[str]:
    """As SQuAD compares them: without case, punctuation and articles."""
    return ARTICLES.sub(" ", text.casefold().translate(PUNCTUATION)).split()


def exact_match(reference: str, answer: str) -> float:
    """SQuAD's: the same words."""
    return float(_words(reference) == _words(answer))


def f1(reference: str, answer: str) -> float:
    """SQuAD's: the harmonic mean of the shares of the words that both have."""
    wanted, given = _words(reference), _words(answer)
    shared = sum((Counter(wanted) & Counter(given)).values())
    if not wanted or not given:
        return float(wanted == given)
    return 2.0 * shared / (len(wanted) + len(given))


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L: the same of the longest common subsequence of words (Lin 2004), without stemming."""
    wanted, given = (re.findall(r"\w+", text.casefold()) for text in (reference, answer))
    if not wanted or not given:
        return float(wanted == given)
    return 2.0 * _common(wanted, given) / (len(wanted) + len(given))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, known in enumerate(other, start=1):
            above = row[place]
            row[place] = before + 1 if word == known else max(row[place], row[place - 1])
            before = above
    return row[-1]


def by_pattern(pattern: str) -> Callable[[str, str], float]:
    """1 where the last match in the answer, or its first group, is the reference's; of a reference in which
    there is none, all of it has to come."""
    compiled = re.compile(pattern)

    def last(text: str) -> str | None:
        found = list(compiled.finditer(text))
        return found[-1][1 if compiled.groups else 0] if found else None

    def same(reference: str, answer: str) -> float:
        wanted, given = last(reference), last(answer)
        wanted = reference if wanted is None else wanted
        return float(given is not None and _normal(given) == _normal(wanted))

    return same


METRICS: Mapping[str, Callable[[Sample, str], float]] = {
    "accuracy": answer_is_right,
    "exact_match": lambda sample, answer: exact_match(sample.answer, answer),
    "f1": lambda sample, answer: f1(sample.answer, answer),
    "rouge_l": lambda sample, answer: rouge_l(sample.answer, answer),
}
"""Those that need no process of their own."""
