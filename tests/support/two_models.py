"""Two tiny base models with tokens of their own, one of which has learned much of what the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny import TURN_END, TURN_START, make_tiny_model

MERGES = (("r", "e"), ("re", "d"), ("e", "n"), ("Ġ", "re"))
"""What the other one reads as one token: the same rows are fewer tokens."""


def make_two(place: Path, rows: Path) -> tuple[Path, Path]:
    """(the better, the other) in folders of these names."""
    better = make_tiny_model(place / "better", hidden=32, layers=1)
    _teach(better, rows)
    return better, make_tiny_model(place / "other", hidden=32, layers=1, vocab=320, seed=1, merges=MERGES)


def _teach(folder: Path, rows: Path, steps: int = 60) -> None:
    """Train all of a model's weights on the rows, a few seconds long, and write them back."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    texts = [
        f"{TURN_START}user\n{row['question']}{TURN_END}\n{TURN_START}assistant\n{row['answer']}{TURN_END}\n"
        for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines())
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        some = [texts[(16 * step + k) % len(texts)] for k in range(16)]
        ids = tokenizer(some, return_tensors="pt", padding=True)
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
        model(**ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
