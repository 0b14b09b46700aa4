"""Base against adapter, on the same examples and under the same quantization."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from budgetsearch.core.records import Score, ScoreJob
from budgetsearch.training.evaluate import accuracy, example_losses, generate_answers, mean_loss
from budgetsearch.training.recipe import Shop, Timer

ANSWER_BATCH = 8
MAX_NEW_TOKENS = 512
SAMPLES = 4
"""Answers shown in the report."""


@dataclass
class Answers:
    """Grades of base and adapter on the same validation rows, and a few texts."""

    base: list[float] = field(default_factory=list)
    adapter: list[float] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def score(base: Any, job: ScoreJob, shop: Shop, started: float) -> tuple[Score, Any]:
    """Losses first, then answers while the limit lasts; returns the score and the bare base."""
    from peft import PeftModel

    timer = Timer()
    model = PeftModel.from_pretrained(base, shop.checkpoint_path / job.checkpoint, is_trainable=False)
    model.eval()
    deadline = started + job.limit_seconds
    adapter_losses, targets = _losses(model, job, shop)
    with model.disable_adapter():
        base_losses, _ = _losses(model, job, shop)
    if not all(map(math.isfinite, (*base_losses, *adapter_losses))):
        raise ArithmeticError("a validation loss is not finite; base and adapter cannot be compared")
    timer.lap("evaluate")
    answers = _answers(model, job, shop, deadline)
    timer.lap("score")
    result = Score(
        status="ok",
        quantization=job.quantization,
        base_loss=mean_loss(base_losses, targets),
        adapter_loss=mean_loss(adapter_losses, targets),
        base_example_losses=tuple(base_losses),
        adapter_example_losses=tuple(adapter_losses),
        base_accuracy=accuracy(answers.base),
        adapter_accuracy=accuracy(answers.adapter),
        task_examples=len(answers.adapter),
        samples=tuple(answers.samples),
        seconds=timer.seconds,
    )
    return result, model.unload()


def _losses(model: Any, job: ScoreJob, shop: Shop) -> tuple[list[float], list[int]]:
    shop.beat("score", 0, None)
    return example_losses(model, shop.data.valid, job.eval_examples, pad=shop.pad, device=shop.device)


def _answers(model: Any, job: ScoreJob, shop: Shop, deadline: float) -> Answers:
    """Greedy answers in small batches; the next one starts only if the last one's time still fits."""
    from budgetsearch.training.data import answer_is_right
    from budgetsearch.training.tokens import load_tokenizer, render_prompt

    answers = Answers()
    examples = shop.data.valid_examples[: job.task_examples]
    tokenizer = load_tokenizer(shop.model_path)
    length = _answer_length(shop)
    longest = 0.0
    for start in range(0, len(examples), ANSWER_BATCH):
        begin = time.monotonic()
        if shop.stopping() or (start and begin + 1.2 * longest > deadline):
            break
        some = examples[start : start + ANSWER_BATCH]
        prompts = [render_prompt(tokenizer, example) for example in some]
        tuned = _write(model, tokenizer, prompts, shop, length)
        with model.disable_adapter():
            plain = _write(model, tokenizer, prompts, shop, length)
        for example, before, after in zip(some, plain, tuned, strict=True):
            answers.adapter.append(answer_is_right(example, after))
            answers.base.append(answer_is_right(example, before))
            question = example.prompt[-1]["content"]
            answers.samples.append(
                {"prompt": question, "reference": example.completion, "base": before, "adapter": after}
            )
        longest = max(longest, time.monotonic() - begin)
    del answers.samples[SAMPLES:]
    return answers


def _write(model: Any, tokenizer: Any, prompts: list[str], shop: Shop, length: int) -> list[str]:
    shop.beat("answers", 0, None)
    return generate_answers(model, tokenizer, prompts, device=shop.device, max_new_tokens=length)


def _answer_length(shop: Shop) -> int:
    """Room for the longest reference of the validation rows and a little more, in tokens."""
    valid = shop.data.valid
    longest = max(len(ids) - prompt for ids, prompt in (valid.row(i) for i in range(len(valid))))
    return min(MAX_NEW_TOKENS, int(longest * 1.25) + 4)
