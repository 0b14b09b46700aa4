"""Rows to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

WORDS = ("red", "green", "blue", "black", "white")


def write_rows(path: Path, rows: int = 80) -> Path:
    """Questions whose answer follows from the question, as JSONL."""
    lines = [
        {"question": f"Say {WORDS[i % 5]} {i % 7} times", "answer": " ".join([WORDS[i % 5]] * (1 + i % 3))}
        for i in range(rows)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path
