"""The judge: the mean loss of an adapter on the answers of test rows, with plain transformers and PEFT.

python -m benchmarks.against.judge MODEL test.jsonl [ADAPTER]

It knows nothing of either side: it takes nothing from budgetsearch, and the template stands in rows.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.against.rows import TEMPLATE, read_rows

MAX_LENGTH = 512


def tokenizer_of(model: str) -> Any:
    """The base's tokenizer with the one template."""
    found = AutoTokenizer.from_pretrained(model)
    found.chat_template = TEMPLATE
    return found


def encoded(tokenizer: Any, row: dict[str, str], max_length: int = MAX_LENGTH) -> tuple[list[int], int]:
    """(ids of the conversation, how many of them are the question's); what is too long loses its end."""
    question = [{"role": "user", "content": row["prompt"]}]
    whole = [*question, {"role": "assistant", "content": row["completion"]}]
    asked, text = (
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=turns is question)
        for turns in (question, whole)
    )
    text = text[
        : text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
    ]  # nothing behind the end counts
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    before = sum(start < len(asked) for start, _ in found["offset_mapping"])
    return list(found["input_ids"])[:max_length], before


def loss_of(model: Any, encodings: Sequence[tuple[list[int], int]]) -> float:
    """Mean cross-entropy per token of the answers, in nats."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids, asked in encodings:
            if asked >= len(ids):
                continue
            logits = model(input_ids=torch.tensor([ids])).logits[0, asked - 1 : -1].float()
            labels = torch.tensor(ids[asked:])
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    return total / count


def judged(model: str, test: Path, adapter: Path | None) -> float:
    """The loss on the rows of a file; without an adapter the base's."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    worn = base if adapter is None else PeftModel.from_pretrained(base, str(adapter))
    tokenizer = tokenizer_of(model)
    return loss_of(worn.eval(), [encoded(tokenizer, row) for row in read_rows(test)])


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("test", type=Path)
    parser.add_argument("adapter", type=Path, nargs="?")
    asked = parser.parse_args()
    print(json.dumps({"loss": judged(asked.model, asked.test, asked.adapter)}))


if __name__ == "__main__":
    main()
