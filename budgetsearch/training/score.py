"""Base against adapter, on the same examples and under the same quantization."""

from __future__ import annotations

import itertools
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetsearch.core.metric import Values
from budgetsearch.core.policy.jobs import MAX_ANSWERS
from budgetsearch.core.records import Score, ScoreJob, Segment
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
from budgetsearch.training.memory import free
from budgetsearch.training.task_metric import Sitting, fill, time_documents
from budgetsearch.training.timer import Timer

if TYPE_CHECKING:
    from budgetsearch.training.data.conversation import Sample
    from budgetsearch.training.data.reader import Reader

ANSWER_BATCH = 8
FIRST_ANSWERS = 2
"""Of the first batch."""
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
    base_metric: list[float | None] = field(default_factory=list)
    adapter_metric: list[float | None] = field(default_factory=list)


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
    base_losses, adapter_losses = shop.measured(base_losses), shop.measured(adapter_losses)
    targets = shop.weights(len(base_losses))
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
        for count in (job.task_examples, MAX_ANSWERS)[: 1 + job.further]:
            _ask_task(model, job.micro_batch, shop, (count, until), answers)
            if count == job.task_examples or len(answers.adapter) == job.task_examples:
                _answer(model, job.micro_batch, shop, (count, until), answers)
    except Exception as error:  # the answers so far stand
        detail = f"answers ended early: {type(error).__name__}: {error}"[:500]
    detail = "; ".join(filter(None, (detail, _told(shop))))
    return replace(
        result,
        base_accuracy=accuracy(answers.base),
        adapter_accuracy=accuracy(answers.adapter),
        task_examples=len(answers.adapter),
        base_grades=tuple(answers.base),
        adapter_grades=tuple(answers.adapter),
        base_metric=tuple(answers.base_metric),
        adapter_metric=tuple(answers.adapter_metric),
        samples=tuple(answers.samples[:SAMPLES]),
        detail=detail,
    )


def _end(job: ScoreJob, started: float) -> float:
    """When the job must come to its end."""
    return started + job.limit_seconds - min(MARGIN_SHARE * job.limit_seconds, MARGIN_SECONDS)


def _answer(model: Any, micro_batch: int, shop: Shop, until: tuple[int, float], answers: Answers) -> None:
    """Greedy answers in small batches, on from those that are there ``until`` there are so many or it is so
    late; a batch that is cut off does not count."""
    from budgetsearch.training.data.grading import answer_is_right

    count, deadline = until
    reader = _reader(shop)
    asked = list(itertools.islice(shop.data.questions(), count))
    length, late = _answer_length(shop), partial(_late, shop, deadline)
    batch = answer_batch(micro_batch)
    for part in answer_parts(len(answers.adapter), len(asked), batch):
        some = asked[part.start : part.stop]
        prompts = [prompt for _, prompt in some]
        ask = partial(
            generate_answers,
            *(model, reader, prompts),
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
        if shop.grader is not None:
            samples = [sample for sample, _ in some]
            answers.base_metric += shop.grader.grade(list(zip(samples, plain, strict=True)), late)
            answers.adapter_metric += shop.grader.grade(list(zip(samples, tuned, strict=True)), late)


def _late(shop: Shop, deadline: float) -> bool:
    shop.beat(None, "answers", 0, None)
    return shop.stopping() or time.monotonic() > deadline


def _ask_task(model: Any, micro_batch: int, shop: Shop, until: tuple[int, float], answers: Answers) -> None:
    """The same of a task that is the metric: adapter and base on its documents."""
    if shop.task is None:
        return
    count, deadline = until
    sitting = _sitting(model, shop, micro_batch, partial(_late, shop, deadline))
    stop = min(count, len(shop.task.documents))
    for part in answer_parts(len(answers.adapter_metric), stop, answer_batch(micro_batch)):
        tuned = sitting.values(part)
        with model.disable_adapter():
            plain = sitting.values(part) if tuned is not None else None
        if tuned is None or plain is None:
            break
        answers.adapter_metric += tuned
        answers.base_metric += plain


def _sitting(model: Any, shop: Shop, micro_batch: int, late: Callable[[], bool]) -> Sitting:
    from budgetsearch.training.data.tokenizer import load_tokenizer

    assert shop.task is not None
    tokenizer = load_tokenizer(shop.model_path, trust_remote_code=shop.trust_remote_code)
    return Sitting(shop.task, model, tokenizer, shop.device, answer_batch(micro_batch), late)


def _told(shop: Shop) -> str:
    """What went wrong in the metric since it was last asked for that."""
    return "; ".join(one.told() for one in (shop.grader, shop.task) if one is not None)


def metric_of(base: Any, checkpoint: Path, segment: Segment, shop: Shop) -> tuple[Values, str]:
    """What the metric gives to the answers of a checkpoint, as many as the segment asks for, and what went
    wrong. None where the time ended."""
    landing = segment.landing

    def late() -> bool:
        shop.beat(segment.trial_id, "answers", segment.stop_tokens, None)
        out = landing is not None and shop.elapsed() > landing.seconds - landing.write_seconds
        return out or shop.stopping()

    found: list[float | None] = []
    detail = ""
    model = worn(base, checkpoint)
    try:
        if shop.task is not None:
            found += [None] * min(segment.answers, len(shop.task.documents))
            fill(_sitting(model, shop, segment.micro_batch, late), found)
        else:
            _grade_rows(model, segment, shop, late, found)
    except Exception as error:  # what was graded stands, and so does the trial
        traceback.print_exc()
        free(shop.device)
        detail = f"answers ended early: {type(error).__name__}: {error}"[:500]
    finally:
        model.unload()
    known = any(value is not None for value in found)
    return tuple(found) if known else (), "; ".join(filter(None, (detail, _told(shop))))


def _grade_rows(
    model: Any, segment: Segment, shop: Shop, late: Callable[[], bool], found: list[float | None]
) -> None:
    """Put the grades of answers to the first validation rows in ``found``. They are generated in batches of
    prompts of about equal length."""
    assert shop.grader is not None
    reader, batch = _reader(shop), answer_batch(segment.micro_batch)
    asked = list(itertools.islice(shop.data.questions(), segment.answers))
    order = sorted(range(len(asked)), key=lambda place: len(asked[place][1]))
    found += [None] * len(asked)
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        ask = [asked[place] for place in places]
        texts = _generated(model, reader, [prompt for _, prompt in ask], shop, late)
        if texts is None:
            break
        graded = shop.grader.grade([(s, text) for (s, _), text in zip(ask, texts, strict=True)], late)
        for place, value in zip(places, graded, strict=True):
            found[place] = value


def _generated(
    model: Any, reader: Reader, prompts: Sequence[Sequence[int]], shop: Shop, late: Callable[[], bool]
) -> list[str] | None:
    return generate_answers(
        *(model, reader, prompts),
        device=shop.device,
        max_new_tokens=_answer_length(shop),
        max_prompt_tokens=shop.data.valid_stats.max_row_tokens,
        give_up=late,
    )


def time_answers(base: Any, shop: Shop, micro_batch: int, seconds: float) -> float:
    """Seconds of one answer of full length by the bare base, in a batch as the scores take it, with its grade
    by the metric; of one document where a task is the metric.

    The batch is given up after ``seconds``, and what it did till then counts for the rest.
    """
    if shop.task is not None:
        return _time_task(base, shop, micro_batch, seconds)
    reader = _reader(shop)
    length, steps = _answer_length(shop), [0]
    some = list(itertools.islice(shop.data.questions(), answer_batch(micro_batch)))
    if not some:
        return 0.0
    grading = _grade_seconds([sample for sample, _ in some], shop, seconds)
    start = time.monotonic()

    def enough() -> bool:
        steps[0] += 1
        return shop.stopping() or time.monotonic() - start > seconds

    generate_answers(
        base,
        reader,
        [prompt for _, prompt in some],
        device=shop.device,
        max_new_tokens=length,
        max_prompt_tokens=shop.data.valid_stats.max_row_tokens,
        give_up=enough,
    )
    return (time.monotonic() - start) / max(1, steps[0]) * length / len(some) + grading


def _time_task(base: Any, shop: Shop, micro_batch: int, seconds: float) -> float:
    assert shop.task is not None
    found = time_documents(_sitting(base, shop, micro_batch, shop.stopping), seconds)
    if why := shop.task.told():
        shop.notice(f"the metric was tried: {why}")
    return found


def _grade_seconds(samples: Sequence[Sample], shop: Shop, seconds: float) -> float:
    """Seconds that the metric takes for one answer: for the references, the first of which may wait for it to
    be imported."""
    if shop.grader is None:
        return 0.0
    shop.grader.grade([(samples[0], samples[0].answer)])
    start, done = time.monotonic(), 0
    for sample in samples:
        shop.grader.grade([(sample, sample.answer)])
        done += 1
        if shop.stopping() or time.monotonic() - start > seconds:
            break
    if why := shop.grader.told():
        shop.notice(f"the metric was tried on references: {why}")
    return (time.monotonic() - start) / done


def answer_batch(micro_batch: int) -> int:
    """Answers that are generated at once."""
    return min(ANSWER_BATCH, micro_batch * 2)


def answer_parts(start: int, stop: int, batch: int) -> Iterator[range]:
    """The answers from ``start`` on in batches, which end where those of a run from the first one on do; the
    first of all is short: where time is, there are a few answers of both rather than none."""
    while start < stop:
        end = min(stop, FIRST_ANSWERS if start == 0 else (start // batch + 1) * batch)
        yield range(start, end)
        start = end


def _reader(shop: Shop) -> Reader:
    from budgetsearch.training.data.reader import Reader
    from budgetsearch.training.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shop.model_path, trust_remote_code=shop.trust_remote_code)
    return Reader.of(tokenizer, shop.data.facts)


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
