"""Measure one quantization on real steps: its rate alone and in a gang, its evaluation, its memory."""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch

from budgetsearch.core.bases import Base
from budgetsearch.core.policy.jobs import OPTIONAL_SHARE
from budgetsearch.core.records import CalibrateJob, Calibration, Params, Probe, Schedule, Segment
from budgetsearch.machine.neighbours import Neighbours
from budgetsearch.storage.ownership import PROBE_TRIAL
from budgetsearch.training.exactness import gangs_are_exact
from budgetsearch.training.gang import Gang
from budgetsearch.training.members import Shop
from budgetsearch.training.memory import free, is_memory_error
from budgetsearch.training.modes import training_mode
from budgetsearch.training.recipe import GangTraining
from budgetsearch.training.score import time_answers
from budgetsearch.training.timer import Timer

MIN_STEPS = 2
EVAL_EXAMPLES = 16
MIN_GAIN = 1.03
"""A larger gang must give so many times the tokens per second of the largest that paid, or that is taken."""
MISSES = 2
"""After so many doublings in a row that did not pay no larger gang is tried: a single timing may be off."""
RECOMPUTE_GAIN = 1.02
"""Gradient checkpointing must give so many times the tokens per second of the smaller micro-batch."""
TICK = 1e-9
"""No step takes less: one that is told to stop at once does nothing."""
FEW_STEPS = 5
"""Fewer do not show by how much they differ."""
SCATTER = 0.5
"""Steps are of rows of several lengths, so those of a quiet machine differ too."""
BUSY_CORES = 0.5
GANGLESS = ("int8",)
"""LLM.int8() handles outlier columns by looking at all rows at once, so members would change each other."""


def calibrate(base: Any, job: CalibrateJob, shop: Shop, load_seconds: float) -> Calibration:
    """Find the largest rank and micro-batch that fit, then the size of a gang at which the rate saturates.

    Where the effective batch does not fit at once, gradient checkpointing is tried as well. Every probe
    begins with the longest rows, so that it shows the memory peak.

    Raises:
        Exception: not even one sample fits at the smallest rank, or the model cannot be trained at all.
    """
    timer = Timer()
    timer.seconds["load"] = load_seconds
    bench, neighbours = _Bench(base, job, shop), Neighbours()
    probes = bench.alone()
    alone = max(probes, key=lambda p: p.tokens_per_second / (RECOMPUTE_GAIN if p.recompute else 1.0))
    gangs = [alone, *bench.gangs(alone)]
    paid, _ = saturated([probe.tokens_per_second for probe in gangs])
    chosen = gangs[paid]
    timer.lap("train")
    count = min(EVAL_EXAMPLES, len(shop.data.valid))
    training = bench.last
    training.evaluate(count, training.members[:1])
    timer.lap("evaluate")
    training.members[0].save()
    timer.lap("checkpoint")
    answer = 0.0
    if job.task_examples and (shop.has_metric or bench.has_time(2 * job.probe_seconds)):
        answer = _answer_seconds(base, shop, alone.micro_batch, job)
    timer.lap("score")
    if said := unrest(bench.scatter, neighbours.cores() if shop.device == "cpu" else 0.0):
        shop.notice(said)
    return Calibration(
        quantization=job.quantization,
        status="ok",
        tokens_per_second=alone.tokens_per_second,
        eval_seconds_per_example=timer.seconds["evaluate"] / count,
        checkpoint_seconds=timer.seconds["checkpoint"],
        load_seconds=load_seconds,
        answer_seconds=answer,
        documents=len(shop.task.documents) if shop.task is not None else 0,
        micro_batch=alone.micro_batch,
        rank=bench.rank,
        recompute=alone.recompute,
        gang=chosen.members,
        probes=tuple(dict.fromkeys([*probes, *gangs])),
        flops_per_token=flops_per_token(base, training),
        peak_bytes=chosen.peak_bytes,
        seconds=dict(timer.seconds),
    )


def _answer_seconds(base: Any, shop: Shop, micro_batch: int, job: CalibrateJob) -> float:
    """What an answer takes; 0 where none can be generated: that is the scores' problem, in the end."""
    try:
        return time_answers(base, shop, micro_batch, 2 * job.probe_seconds)
    except Exception:
        traceback.print_exc()
    free(shop.device)
    return 0.0


def saturated(rates: Sequence[float]) -> tuple[int, bool]:
    """(which of these rates, each of twice as many members as the one before, is the last that paid; whether
    it is of no use to try more)."""
    chosen, misses = 0, 0
    for place, rate in enumerate(rates):
        if rate >= MIN_GAIN * rates[chosen]:
            chosen, misses = place, 0
        elif place:
            misses += 1
        if misses == MISSES:
            return chosen, True
    return chosen, False


def spread(rates: Sequence[float]) -> float:
    """The distance of the quartiles as a share of the median; 0 of too few."""
    if len(rates) < FEW_STEPS:
        return 0.0
    low, middle, high = statistics.quantiles(rates, n=4)
    return (high - low) / middle if middle else 0.0


def unrest(scatter: float, others: float) -> str:
    """What to say of a machine that is not quiet: steps that differ, cores that others keep busy."""
    found = (
        [f"other processes keep {others:.1f} of {os.cpu_count()} cores busy"] if others > BUSY_CORES else []
    )
    found += [f"equal steps differ by {scatter:.0%}"] if scatter > SCATTER else []
    if not found:
        return ""
    return f"this machine is not quiet ({'; '.join(found)}): what was measured may not last"


def flops_per_token(base: Any, training: GangTraining) -> float:
    """Of one member's training: forward and backward through the linear layers.

    A frozen weight is used twice, a trained one three times, at two operations each. The output layer
    works on the completion tokens only. Attention itself is left out, so a utilisation is a lower bound.
    """
    data = training.shop.data.train_stats
    head = base.get_output_embeddings()
    layers = [m for m in base.modules() if hasattr(m, "in_features") and m is not head]
    frozen = sum(m.in_features * m.out_features for m in layers)
    frozen += getattr(head, "weight", torch.empty(0)).numel() * data.target_tokens / data.tokens
    trained = sum(weight.numel() for weight in training.members[0].adapter.weights().values())
    return float(4 * frozen + 6 * trained)


class _Bench:
    """Probes on one base: real steps of fresh adapters."""

    def __init__(self, base: object, job: CalibrateJob, shop: Shop) -> None:
        self.base, self.job, self.shop = base, job, shop
        self.rank = job.ranks[0]
        """What is measured: the largest that fits."""
        self.last: GangTraining
        self.scatter = 0.0
        """By how much the steps of a probe differed, as a share of their median rate."""
        self._begun, self._step_seconds = time.monotonic(), 0.0
        self._plain = 0
        data = shop.data.train
        longest = sorted(range(len(data)), key=lambda row: (-data.lengths[row], row))
        self._longest = longest[: job.batch_size]

    def alone(self) -> list[Probe]:
        """One trial alone with the largest micro-batch that fits, plain and, where that lets more fit, with
        gradient checkpointing; at the largest rank that fits at all."""
        whole = (self.job.batch_size, self.job.batch_size)
        foreseen = self.job.micro_batches or (whole,) * len(self.job.ranks)
        for rank, most in zip(self.job.ranks, foreseen, strict=True):
            self.rank = rank
            plain = self._largest(most[0], recompute=False)
            if plain and plain[0].micro_batch >= self.job.batch_size:
                return plain
            again = self._recomputing(most[1], plain)
            if (
                again is None and not plain and most[0] == 0
            ):  # it can only be plain, so the foresight is tried
                again = self._largest(1, recompute=False)
            if plain or again:
                return plain + (again or [])
        raise MemoryError(f"one row alone does not fit at rank {self.rank}")

    def _largest(self, micro: int, *, recompute: bool) -> list[Probe]:
        """The largest micro-batch from ``micro`` down that fits; nothing if none does."""
        while micro:
            try:
                return [self.probe(1, micro, recompute)]
            except Exception as error:
                if not is_memory_error(error):
                    raise
            free(self.shop.device)
            if not self.shop.make_room():  # another resident base goes first
                micro //= 2
        return []

    def _recomputing(self, micro: int, plain: list[Probe]) -> list[Probe] | None:
        """The same with gradient checkpointing in the passes that need it, if that lets a larger micro-batch
        fit; None if the model cannot."""
        self._plain = plain[0].micro_batch * plain[0].length if plain else 0
        try:
            found = self._largest(micro, recompute=True)
        except Exception:  # not every model can; the plain probe stands
            traceback.print_exc()
            return None
        return [probe for probe in found if not plain or probe.micro_batch > plain[0].micro_batch]

    def gangs(self, alone: Probe) -> list[Probe]:
        """Twice as many members each time, while that may pay and memory lasts."""
        found, before = [alone], alone
        alone_only = (
            Base.parse(self.job.quantization).quantization in GANGLESS
            or self.last.members[0].adapter.on_experts
        )
        most = 1 if alone_only else self.job.max_gang
        if most > 1 and not self._members_stay_apart():
            most = 1
        while 2 * before.members <= most and self._has_room(before) and self.has_time(self._double()):
            probe = self._sharing(2 * before.members, before.micro_batch, alone.recompute)
            if probe is None:
                break
            found.append(probe)
            if saturated([p.tokens_per_second for p in found])[1] or self.shop.stopping():
                break
            before = probe
        free(self.shop.device)
        return found[1:]

    def _members_stay_apart(self) -> bool:
        """Whether a gang of two is exact in this model."""
        try:
            first = _segment(self.job, self.rank, self.shop.worn)
            segments = [replace(first, trial_id=PROBE_TRIAL + n, seed=n) for n in range(2)]
            training = GangTraining.set_up(self.base, segments, self.shop)
            exact = gangs_are_exact(self.base, training.members, self.shop)
        except Exception:  # out of memory, or a model that gangs cannot train
            traceback.print_exc()
            return False
        if not exact:
            self.shop.notice("in this model members of a gang would change each other, so each trains alone")
        return exact

    def _sharing(self, members: int, micro: int, recompute: bool) -> Probe | None:
        """So many members with as much of each as fits; None if it does not, or the model trains no gangs."""
        while micro:
            try:
                return self.probe(members, micro, recompute)
            except Exception as error:  # one alone stands
                traceback.print_exc()
                if not is_memory_error(error):
                    return None
            free(self.shop.device)
            micro //= 2
        return None

    def _double(self) -> float:
        """Seconds of a probe with twice as many members: a first step, and those that are timed."""
        step = 2 * self._step_seconds
        return step + max(MIN_STEPS * step, self.job.probe_seconds)

    def has_time(self, seconds: float) -> bool:
        """Whether something that is not indispensable may take so long."""
        passed = time.monotonic() - self._begun
        return passed + seconds <= OPTIONAL_SHARE * self.job.limit_seconds

    def _has_room(self, before: Probe) -> bool:
        """On the CPU nobody says no until it is too late: twice the peak must be free."""
        return self.shop.device != "cpu" or before.peak_bytes < psutil.virtual_memory().available

    def probe(self, members: int, micro: int, recompute: bool) -> Probe:
        """Time real steps of so many members side by side."""
        self.shop.start_peak()
        first = replace(_segment(self.job, self.rank, self.shop.worn), micro_batch=micro, recompute=recompute)
        first = replace(first, plain_positions=self._plain if recompute else 0)
        segments = [replace(first, trial_id=PROBE_TRIAL + n, seed=n) for n in range(members)]
        self.last = training = GangTraining.set_up(self.base, segments, self.shop)
        gang = Gang(self.base, [m.adapter for m in training.members])
        mode = training_mode(self.base, recompute=recompute, torch_compile=self.shop.torch_compile)
        rates, seconds = list[float](), list[float]()
        with mode, gang.worn():
            for member in training.members:
                member.make_states()
                member.begin_step(self._longest)
            self._step(training, gang)
            peak = self.shop.peak_bytes()  # with gradient checkpointing: later passes may go without
            start = time.monotonic()
            for step in range(1, 10_000):
                tokens, before = self._tokens(training), time.monotonic()
                self._step(training, gang)
                seconds.append(max(TICK, time.monotonic() - before))
                rates.append((self._tokens(training) - tokens) / seconds[-1])
                late = time.monotonic() - start >= self.job.probe_seconds
                if self.shop.stopping() or (step >= MIN_STEPS and late):
                    break
        if (members > 1 or micro > 1) and (why := self.shop.pressed()):  # it would shrink at once
            raise MemoryError(why)
        # Medians: a burst of other work may meet a step.
        rate, self._step_seconds = statistics.median(rates), statistics.median(seconds)
        self.scatter = max(self.scatter, spread(rates))
        longest = int(self.shop.data.train.lengths[self._longest[0]])
        peak = max(0, (peak if recompute else self.shop.peak_bytes()) - self.shop.other_bases())
        return Probe(members, micro, recompute, longest, rate, peak)

    def _step(self, training: GangTraining, gang: Gang) -> None:
        """Passes until every member has taken its step."""
        wanted = training.members[0].steps + 1
        while training.members[0].steps < wanted and not self.shop.stopping():
            training.step_on(gang, training.members)
            for member in training.members:
                if member.status is not None:
                    raise ArithmeticError(f"a probe of {self.job.quantization} diverged: {member.detail}")
        self.shop.beat(None, "calibrate", self._tokens(training), None)

    def _tokens(self, training: GangTraining) -> int:
        return sum(member.tokens for member in training.members)


def _segment(job: CalibrateJob, rank: int, worn: str) -> Segment:
    params: Params = {
        "quantization": Base.parse(job.quantization).quantization,
        "rank": rank,
        "learning_rate": 1e-6,
        "dropout": job.dropout,
        **({"targets": worn} if worn else {}),
    }
    return Segment(
        trial_id=PROBE_TRIAL,
        params=params,
        seed=0,
        rung=0,
        start_tokens=0,
        stop_tokens=10**12,
        schedule=Schedule(0, 10**12),
        batch_size=job.batch_size,
        micro_batch=1,
    )
