"""Shared fixtures: a tiny model, a tiny data set, and a cache of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two tests run at a time: threads that wait for each other on the same cores would slow both tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = ("red", "green", "blue", "black", "white")


def write_rows(path: Path, rows: int = 80) -> Path:
    """Questions whose answer follows from the question, as JSONL."""
    lines = [
        {"question": f"Say {WORDS[i % 5]} {i % 7} times", "answer": " ".join([WORDS[i % 5]] * (1 + i % 3))}
        for i in range(rows)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a byte tokenizer."""
    from budgetsearch.training.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty rows of JSONL."""
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that all tests share, apart from the user's."""
    return tmp_path_factory.mktemp("cache")
