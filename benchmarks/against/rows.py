"""Rows of a pair: the same for both sides to train on, and others, which neither has seen, to judge by."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

TEST_ROWS = 200
SOURCES: Mapping[str, str] = {
    "family_relationships": "reasoning-gym:family_relationships?size=2200&seed=0",
    "gsm8k": "hub:openai/gsm8k:main",
}
"""By the name of a set of rows; another one is a path."""
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{{ '\\n' }}{% endif %}"
)
"""One chat template for both sides and the judge: what is compared is the search."""


def split(rows: list[dict[str, str]], seed: int, test_rows: int) -> tuple[list[dict[str, str]], ...]:
    """(to train on, to judge by): no prompt stands in both.

    Raises:
        ValueError: too few rows.
    """
    unique = list({row["prompt"]: row for row in rows}.values())
    random.Random(seed).shuffle(unique)
    if len(unique) < 2 * test_rows:
        raise ValueError(
            f"{len(unique)} rows with prompts of their own are too few for {test_rows} test rows"
        )
    return unique[test_rows:], unique[:test_rows]


def write_rows(folder: Path, source: str, seed: int, test_rows: int = TEST_ROWS) -> tuple[Path, Path]:
    """The two files in ``folder``."""
    from budgetsearch.training.data.samples import load_samples  # the judge reads this file too

    samples = load_samples(SOURCES.get(source, source))
    rows = [
        {"prompt": "\n\n".join(str(turn.content) for turn in sample.asked), "completion": sample.answer}
        for sample in samples
    ]
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, some in zip(paths, split(rows, seed, test_rows), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return paths


def read_rows(path: Path) -> list[dict[str, str]]:
    """What ``write_rows`` has written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
