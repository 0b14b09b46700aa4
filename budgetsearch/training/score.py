"""Base against adapter, on the same examples and under the same quantization."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from budgetsearch.core.policy.jobs import MAX_ANSWERS
from budgetsearch.core.records import Score, ScoreJob
from budgetsearch.training.adapters import worn
from budgetsearch.training.evaluate import (
    EVAL_BATCH,
    accuracy,
    example_losses,
    generate_answers,
    mean_loss,
    parts,
)
from budgetsearch.training.members import Shop
from budgetsearch.training.recipe import Timer

if TYPE_CHECKING:
    from budgetsearch.training.data.conversation import Sample
    from budgetsearch.training.data.encoder import Encoder

ANSWER_BATCH = 8
MARGIN_SHARE = 0.15
"""Of the limit: kept for the token under way when it ends, on a machine that stutters, ..."""
MARGIN_SECONDS = 5.0
"""... and this at most."""
MAX_NEW_TOKENS = 512
SAMPLES = 4
"""Answers shown in the report."""


@dataclass
class Answers:
    """Grades of base and adapter on the same validation rows, and a few texts."""

    base: list[float] = field(default_factory=list)
    adapter: list[float] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def score(base: Any, job: ScoreJob, shop: Shop, started: float) -> Score:
    """Losses, then answers while the limit lasts; afterwards the base is bare again."""
    timer = Timer()
    model = worn(base, shop.checkpoint_path / job.checkpoint)
    result = Score(status="ok", quantization=job.quantization)
    if job.eval_examples:
        result = _measured(model, job, shop, started, result)
        timer.lap("evaluate")
    if job.task_examples:
        result = _answered(model, job, shop, started, result)
        timer.lap("score")
    model.unload()
    return replace(result, seconds=timer.seconds)


def _measured(model: Any, job: ScoreJob, shop: Shop, started: float, result: Score) -> Score:
    """Both losses part by part: whenever the time ends, the same examples were measured of both."""
    adapter_losses: list[float] = []
    base_losses: list[float] = []
    data, batch, until = shop.data.valid, min(EVAL_BATCH, job.micro_batch), _end(job, started)

    def measure(part: range) -> list[float]:
        (losses,) = example_losses(
            *(model, data, part), pad=shop.pad, device=shop.device, half=shop.half, batch=batch
        )
        return losses

    for part in parts(min(job.eval_examples, len(data)), batch):
        shop.beat(None, "score", 0, None)
        adapter_losses += measure(part)
        with model.disable_adapter():
            base_losses += measure(part)
        if shop.stopping() or time.monotonic() > until:
            break
    targets = [data.targets(row) for row in range(len(base_losses))]
    if not all(map(math.isfinite, (*base_losses, *adapter_losses))):
        raise ArithmeticError("a validation loss is not finite; base and adapter cannot be compared")
    return replace(
        result,
        base_loss=mean_loss(base_losses, targets),
        adapter_loss=mean_loss(adapter_losses, targets),
        base_example_losses=tuple(base_losses),
        adapter_example_losses=tuple(adapter_losses),
        example_tokens=tuple(targets),
    )


def _answered(model: Any, job: ScoreJob, shop: Shop, started: float, result: Score) -> Score:
    answers, detail = Answers(), ""
    until = _end(job, started)
    try:
        _answer(model, job.micro_batch, shop, (job.task_examples, until), answers)
        if job.further and len(answers.adapter) == job.task_examples:
            _answer(model, job.micro_batch, shop, (MAX_ANSWERS, until), answers)
    except Exception as error:  # the answers so far stand
        detail = f"answers ended early: {type(error).__name__}: {error}"[:500]
    return replace(
        result,
        base_accuracy=accuracy(answers.base),
        adapter_accuracy=accuracy(answers.adapter),
        task_examples=len(answers.adapter),
        base_grades=tuple(answers.base),
        adapter_grades=tuple(answers.adapter),
        samples=tuple(answers.samples[:SAMPLES]),
        detail=detail,
    )


def _end(job: ScoreJob, started: float) -> float:
    """When the job must come to its end."""
    return started + job.limit_seconds - min(MARGIN_SHARE * job.limit_seconds, MARGIN_SECONDS)


def _answer(model: Any, micro_batch: int, shop: Shop, until: tuple[int, float], answers: Answers) -> None:
    """Greedy answers in small batches, on from those that are there ``until`` there are so many or it is so
    late; a batch that is cut off does not count."""
    from budgetsearch.training.data.encoder import questions
    from budgetsearch.training.data.grading import answer_is_right

    count, deadline = until
    encoder = _encoder(shop)
    asked = list(itertools.islice(questions(encoder, shop.data.valid_samples), count))
    length = _answer_length(shop)

    def late() -> bool:
        shop.beat(None, "answers", 0, None)
        return shop.stopping() or time.monotonic() > deadline

    batch = answer_batch(micro_batch)
    for start in range(len(answers.adapter), len(asked), batch):
        some = asked[start : start + batch]
        prompts = [prompt for _, prompt in some]
        ask = partial(
            generate_answers,
            *(model, encoder, prompts),
            device=shop.device,
            max_new_tokens=length,
            max_prompt_tokens=shop.data.valid_stats.max_row_tokens,
            give_up=late,
        )
        tuned = ask()
        with model.disable_adapter():
            plain = ask() if tuned is not None else None
        if tuned is None or plain is None:
            break
        for (sample, _), before, after in zip(some, plain, tuned, strict=True):
            answers.adapter.append(answer_is_right(sample, after))
            answers.base.append(answer_is_right(sample, before))
            answers.samples.append(_shown(sample, before, after))


def time_answers(base: Any, shop: Shop, micro_batch: int, seconds: float) -> float:
    """Seconds of one answer of full length by the bare base, in a batch as the scores take it.

    The batch is given up after ``seconds``, and what it did till then counts for the rest.
    """
    from budgetsearch.training.data.encoder import questions

    encoder = _encoder(shop)
    length, steps = _answer_length(shop), [0]
    some = list(itertools.islice(questions(encoder, shop.data.valid_samples), answer_batch(micro_batch)))
    if not some:
        return 0.0
    start = time.monotonic()

    def enough() -> bool:
        steps[0] += 1
        return shop.stopping() or time.monotonic() - start > seconds

    generate_answers(
        base,
        encoder,
        [prompt for _, prompt in some],
        device=shop.device,
        max_new_tokens=length,
        max_prompt_tokens=shop.data.valid_stats.max_row_tokens,
        give_up=enough,
    )
    return (time.monotonic() - start) / max(1, steps[0]) * length / len(some)


def answer_batch(micro_batch: int) -> int:
    """Answers that are generated at once."""
    return min(ANSWER_BATCH, micro_batch * 2)


def _encoder(shop: Shop) -> Encoder:
    from budgetsearch.training.data.encoder import Encoder
    from budgetsearch.training.data.templates import Options
    from budgetsearch.training.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shop.model_path, trust_remote_code=shop.trust_remote_code)
    return Encoder(tokenizer, Options(**shop.data.facts["options"]))


def _shown(sample: Sample, before: str, after: str) -> dict[str, Any]:
    from budgetsearch.training.data.grading import grading_of

    return {
        "prompt": sample.asked[-1].content,
        "reference": sample.answer,
        "base": before,
        "adapter": after,
        "grading": grading_of(sample),
    }


def _answer_length(shop: Shop) -> int:
    """Room for nearly all references of the validation rows and a little more, in tokens."""
    valid = shop.data.valid
    return room_for([valid.targets(row) for row in range(len(valid))])


def room_for(references: Sequence[int]) -> int:
    """Room for nearly all answers as long as these and a little more, in tokens."""
    lengths = sorted(references)
    return min(MAX_NEW_TOKENS, int(lengths[int(0.95 * (len(lengths) - 1))] * 1.25) + 4)
