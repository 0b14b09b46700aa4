"""The training recipe of a job, in phases: set up, train, evaluate, save. Its segments form a gang."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from budgetsearch.core.course import Stint
from budgetsearch.core.errors import CheckpointError, UnreadableError
from budgetsearch.core.records import Segment, SegmentResult
from budgetsearch.core.resources.disk import CHECKPOINT_BYTES, FILES_BYTES
from budgetsearch.core.resources.memory import needs_as_much
from budgetsearch.core.results import untrained
from budgetsearch.storage.ownership import checkpoint_in
from budgetsearch.training.attention import unmasked
from budgetsearch.training.batches import Batch, collate, width_step
from budgetsearch.training.evaluate import EVAL_BATCH, PARTS, example_losses, mean_loss, parts
from budgetsearch.training.gang import Gang, Pass
from budgetsearch.training.losses import target_losses
from budgetsearch.training.members import OTHERS, Diverged, Member, Shop
from budgetsearch.training.memory import free, is_memory_error
from budgetsearch.training.modes import kept_activations, mixed, training_mode
from budgetsearch.training.neftune import noisy
from budgetsearch.training.score import metric_of
from budgetsearch.training.timer import Timer
from budgetsearch.training.writer import Writer

KEPT = ("ok", "cancelled", "out_of_memory")
"""Whoever ends so has something to go on from."""


class MemoryPressure(Exception):
    """Memory is nearly full: less at a time, before the allocator fails or another process does."""


@dataclass
class Evaluated:
    """What the averaged weights of a member come to on the validation subset."""

    loss: float
    example_losses: tuple[float, ...]


@dataclass
class GangTraining:
    """Members that train together, as many at a time as fit."""

    base: Any
    shop: Shop
    members: list[Member]
    width: int
    """So many train at once; halved when memory runs out."""
    recompute: bool = False
    """Gradient checkpointing: activations are computed again in the backward pass."""
    evaluated: dict[int, Evaluated] = field(default_factory=dict)
    """By trial."""
    last_words: str = ""
    """Of whoever ran out of memory last."""
    yielded: bool = False
    """Whether anything shrank because of other processes, which says nothing of what fits."""
    broken: dict[int, SegmentResult] = field(default_factory=dict)
    """Trials whose checkpoint cannot be read, or for whose next one there is no room, with their result."""
    course: list[Stint] = field(default_factory=list)
    """Who trained side by side so far, and for how long."""
    writer: Writer = field(default_factory=Writer)
    """Of the checkpoints."""
    _ahead: tuple[list[int], list[list[int]], Batch] | None = None
    """Whose rows the next pass is on, and which, as far as that is known; and what was made of them."""
    _passes: int = 0
    """Of the stint under way."""
    _plain: bool = False
    """Whether the last pass went without the gradient checkpointing that others need."""

    @classmethod
    def set_up(cls, base: Any, segments: Sequence[Segment], shop: Shop) -> GangTraining:
        """Fresh trials, and such that go on exactly where their checkpoints stopped."""
        if len(segments) > 1 and shop.optimizer != "adamw":
            raise ValueError("8-bit states hold blocks of one tensor: only one member at a time")
        members: list[Member] = []
        broken: dict[int, SegmentResult] = {}
        for s in segments:
            try:
                members.append(Member.set_up(base, s, shop))
            except CheckpointError as error:
                broken[s.trial_id] = untrained(s, "lost", str(error))
            except UnreadableError as error:
                broken[s.trial_id] = untrained(s, "unread", str(error))
        if members and (why := _no_room(members, shop)):
            broken |= {m.segment.trial_id: untrained(m.segment, "unwritten", why) for m in members}
            members = []
        return cls(base, shop, members, len(members), segments[0].recompute, broken=broken)

    # ---------------------------------------------------------------------- training

    def train(self) -> None:
        """Until every member has a status: ok, cancelled if told to stop, diverged, out of memory."""
        with training_mode(self.base, recompute=self.recompute, torch_compile=self.shop.torch_compile):
            while group := self._unfinished()[: self.width]:
                sizes, cause, self._passes = tuple(m.micro_batch for m in group), "", 0
                plain = all(m.plain_positions == m.segment.plain_positions for m in group)
                try:
                    self._together(group)
                except MemoryPressure as pressure:
                    cause = str(pressure)
                    self.yielded = self.yielded or cause == OTHERS
                except Exception as error:
                    if not is_memory_error(error):
                        raise
                    cause, self.last_words = "out of memory", str(error)
                trials = tuple(m.segment.trial_id for m in group)
                self.course.append(Stint(trials, sizes, self._passes, bool(cause), plain))
                if cause:  # outside, where the traceback holds no tensors any more
                    self._make_smaller(group, cause)

    def repeat(self, course: Sequence[Stint]) -> None:
        """Train as it was done before: the same passes with the same neighbours, whatever memory did then.

        A member that had been trained before and comes without its checkpoint stands in for itself: fresh
        weights at its place in the data. Nothing of it reaches its neighbours but the shape of the batch.
        """
        members = {m.segment.trial_id: m for m in self.members}
        for member in self.members:
            if not member.segment.checkpoint_in:
                member.skip_to(member.segment.start_tokens)
        with training_mode(self.base, recompute=self.recompute, torch_compile=self.shop.torch_compile):
            for stint in course:
                group = [members[number] for number in stint.trial_ids]
                for member, size in zip(group, stint.micro_batches, strict=True):
                    member.micro_batch = size
                    member.plain_positions = member.segment.plain_positions if stint.plain else 0
                self._repeat(group, stint.passes)
                if stint.cut:
                    for member in group:
                        member.clear()
        self.course = list(course)
        for member in self.members:
            member.status = member.status or "cancelled"

    def _repeat(self, group: list[Member], passes: int) -> None:
        gang = Gang(self.base, [m.adapter for m in group])
        with gang.worn():
            for turn in range(passes):
                if self.shop.stopping():
                    return
                self.step_on(gang, group)
                shown = group[turn % len(group)]
                loss = shown.recent[-1] if shown.recent else None
                self.shop.beat(shown.segment.trial_id, "train", shown.tokens, loss)

    def _unfinished(self) -> list[Member]:
        return [m for m in self.members if m.status is None]

    def _together(self, group: list[Member]) -> None:
        """Steps until one of the group has a status."""
        gang = Gang(self.base, [m.adapter for m in group])
        turn = 0
        for member in group:
            member.pilot.begin(member.tokens, self.shop.elapsed())
        with gang.worn():
            while all(m.status is None for m in group):
                if self.shop.stopping():
                    for member in group:
                        member.status = "cancelled"
                    return
                self.step_on(gang, group)
                self._passes = turn = turn + 1
                smaller = all(m.status is None for m in group) and (
                    len(group) > 1 or group[0].micro_batch > 1
                )
                if smaller and (why := self.shop.pressed()):
                    raise MemoryPressure(why)
                shown = group[turn % len(group)]
                loss = shown.recent[-1] if shown.recent else None
                self.shop.beat(shown.segment.trial_id, "train", shown.tokens, loss)

    def step_on(self, gang: Gang, group: list[Member]) -> None:
        """A micro-batch of every member that fits in; whoever completes its effective batch steps."""
        start = time.monotonic()
        rows, device = self._side_by_side(group, [m.next_rows() for m in group]), self.shop.device
        batch = self._prepared(group, rows)
        now = Pass(batch.rows, batch.lengths, [m.mask_seed for m in group], training=True)
        alone = self.recompute and len(group) == 1
        self._plain = alone and batch.ids.numel() <= group[0].plain_positions
        ways = kept_activations(self.base, self._plain), unmasked(self.base, batch.ids.shape[1])
        alphas = [float(m.segment.params.get("neftune_alpha", 0.0)) for m in group]
        with gang.passing(now), ways[0], ways[1], noisy(self.base, now, alphas):
            with mixed(device, self.shop.half):
                losses = target_losses(self.base, batch)
            sums = [part.sum() for part in losses.split(list(batch.targets))]
            # The token mean over the effective batch, whatever the micro-batches: same gradient.
            parts = torch.stack([s / m.step_targets for s, m in zip(sums, group, strict=True)])
            parts_scaled = parts
            if any(m.scale != 1.0 for m in group):  # number by number: a tensor of them is waited for
                parts_scaled = torch.stack([part * m.scale for part, m in zip(parts, group, strict=True)])
            parts_scaled.sum().backward()
        done = zip(group, rows, parts.detach(), strict=True)
        complete = [member for member, own, part in done if own and member.take(part)]
        for k, member in enumerate(group):
            member.positions += batch.ids.shape[1] * batch.rows[k]
        self._prepare(group, self._side_by_side(group, [m.rows_ahead() for m in group]))
        if complete:
            # One wait for the device, however many members.
            found = torch.stack([m.measure() for m in complete]).tolist()
            for member, (loss, norm) in zip(complete, found, strict=True):
                self._finish(member, loss, norm)
        seconds = time.monotonic() - start
        for k, member in enumerate(group):
            member.charge("train", seconds * batch.tokens[k] / sum(batch.tokens))

    def _prepare(self, group: list[Member], rows: list[list[int]]) -> Batch:
        """The batch of these rows on its way to the device: before anybody waits for the pass that runs."""
        batch = collate([m.rows for m in group], rows, self.shop.pad, width_step(self.shop.device))
        batch = batch.to(self.shop.device)
        self._ahead = _ids(group), rows, batch
        return batch

    def _prepared(self, group: list[Member], rows: list[list[int]]) -> Batch:
        """The same, if it was not prepared already: a step may begin again, or a neighbour have left."""
        known, self._ahead = self._ahead, None
        same = known is not None and known[:2] == (_ids(group), rows)
        return known[2] if known is not None and same else self._prepare(group, rows)

    def _side_by_side(self, group: list[Member], rows: list[list[int]]) -> list[list[int]]:
        """The micro-batch of each member; nothing of those whose rows, padded to the widest one's length, do
        not fit beside the others. Who has computed least goes first: nobody waits for long."""
        room = sum(m.most_positions for m in group)
        taken: list[Member] = []
        count = width = 0
        for member, own in sorted(zip(group, rows, strict=True), key=lambda pair: pair[0].positions):
            wider = max(width, member.width_of(own))
            more = count + len(own)
            if not taken or more * wider <= room:
                taken.append(member)
                count, width = more, wider
        return [own if m in taken else [] for m, own in zip(group, rows, strict=True)]

    def _finish(self, member: Member, loss: float, norm: float) -> None:
        try:
            member.finish_step(loss, norm)
        except Diverged as error:  # its neighbours never see it: it leaves before the next pass
            member.status, member.detail = "diverged", str(error)

    def _make_smaller(self, group: list[Member], cause: str) -> None:
        """Memory ran out: fewer members at a time, then smaller micro-batches, from the last step on."""
        rows = max(member.rows_under_way for member in group)
        for member in group:
            member.clear()
        if self.shop.make_room():
            note = f"{cause}; another base had to go"
        elif len(group) > 1:
            self.width = (len(group) + 1) // 2
            note = f"{cause} with {len(group)} at once; went on with {self.width}"
        elif self._plain:
            note = f"{cause} in a pass without gradient checkpointing; went on with it in every pass"
            for member in self._like(group[0]):
                member.plain_positions = 0
        elif group[0].micro_batch > 1 or rows > 1:
            half = group[0].micro_batch // 2
            went_on = half or "one row after the other"
            note = f"{cause} with a micro-batch of {group[0].micro_batch}; went on with {went_on}"
            for member in self._like(group[0]):
                member.micro_batch = min(member.micro_batch, half)
        else:
            group[0].status = "out_of_memory"
            note = f"one sample alone does not fit: {self.last_words}"[:500]
        free(self.shop.device)
        names = ", ".join(str(member.segment.trial_id) for member in group)
        self.shop.notice(f"trial {names}: {note}")
        for member in group:
            member.detail = "; ".join(filter(None, (member.detail, note)))

    def _like(self, one: Member) -> list[Member]:
        """Who needs as much: what one cannot do its like cannot do either."""
        return [m for m in self._unfinished() if needs_as_much(m.segment.params, one.segment.params)]

    # ---------------------------------------------------------------------- evaluation

    def evaluate(self, count: int, group: Sequence[Member] | None = None, batch: int = EVAL_BATCH) -> None:
        """Losses of the members that are well on the first ``count`` validation examples, with the
        averaged weights: one pass for all of them, or less at a time if memory runs out."""
        if group is None:
            group = [m for m in self.members if m.status == "ok" and m.segment.evaluate]
        if not group:
            return
        self.shop.beat(group[0].segment.trial_id, "evaluate", group[0].tokens, None)
        batch = max(1, min(batch, *(m.micro_batch for m in group)))
        try:
            self._evaluate(count, group, batch)
        except Exception as error:
            if not is_memory_error(error) or (len(group) == 1 and batch == 1):
                raise
        else:
            return
        free(self.shop.device)
        if len(group) > 1:
            half = len(group) // 2
            self.evaluate(count, group[:half], batch)
            self.evaluate(count, group[half:], batch)
        else:
            self.evaluate(count, group, batch // 2)

    def _evaluate(self, count: int, group: Sequence[Member], batch: int) -> None:
        gang, late, shop = (
            Gang(self.base, [m.adapter for m in group], gradients=False),
            self._late(group),
            self.shop,
        )
        found: list[list[float]] = [[] for _ in group]
        count = min(count, len(shop.data.valid))
        with gang.worn(), ExitStack() as stack:
            for member in group:
                stack.enter_context(member.adapter.averaged())
            for part in parts(count, batch, PARTS if late else 1):
                measured = example_losses(
                    *(self.base, shop.data.valid, part),
                    pad=shop.pad,
                    device=shop.device,
                    half=shop.half,
                    batch=batch,
                    gang=gang,
                )
                for losses, some in zip(found, measured, strict=True):
                    losses += some
                if late is not None and late():
                    break  # the first examples must do
        weights = shop.weights(len(found[0]))
        for member, losses in zip(group, map(shop.measured, found), strict=True):
            mean = mean_loss(losses, weights)
            if math.isfinite(mean):
                self.evaluated[member.segment.trial_id] = Evaluated(mean, tuple(losses))
            else:
                member.status, member.detail = "diverged", f"validation loss {mean}"

    def _late(self, group: Sequence[Member]) -> Callable[[], bool] | None:
        """Whether a full run has time left for its checkpoint alone; None where nobody waits for one."""
        landings = [m.segment.landing for m in group if m.segment.landing is not None]
        if not landings:
            return None
        until = min(landing.seconds - 2 * landing.write_seconds for landing in landings)
        return lambda: self.shop.stopping() or self.shop.elapsed() > until

    # ------------------------------------------------------------------------- results

    def share(self, phase: str, seconds: float) -> None:
        """Charge a phase's time to all members alike."""
        for member in self.members:
            member.charge(phase, seconds / len(self.members))

    def result(self, member: Member) -> SegmentResult:
        """Save the member's checkpoint, if there is anything to save, and say what came of it."""
        segment, name = member.segment, None
        if member.tokens == segment.start_tokens:
            name = segment.checkpoint_in
        elif member.status in KEPT:
            start = time.monotonic()
            name = self._saved(member)
            member.charge("checkpoint", time.monotonic() - start)
        else:
            self.writer.drop(member)
        recent = member.recent[-8:]
        found = self.evaluated.get(segment.trial_id)
        trained = member.tokens - segment.start_tokens
        return SegmentResult(
            trial_id=segment.trial_id,
            rung=segment.rung,
            status=member.status or "cancelled",
            tokens=member.tokens if name else segment.start_tokens,
            loss=found.loss if found else None,
            example_losses=found.example_losses if found else (),
            train_loss=sum(recent) / len(recent) if recent else None,
            train_noise=statistics.stdev(recent) / math.sqrt(len(recent)) if len(recent) > 1 else 0.0,
            steps=len(member.recent),
            seconds=member.seconds,
            peak_bytes=self.shop.peak_bytes(),
            checkpoint_out=name,
            detail=member.detail,
            micro_batch=max(1, member.micro_batch),
            gang=self.width,
            began=len(self.members) if self.broken else 0,
            yielded=self.yielded,
            padding=1.0 - trained / member.positions if member.positions and trained else 0.0,
            course=tuple(self.course),
            revisions=tuple(member.pilot.revisions),
        )

    def begin_saving(self) -> None:
        """Write checkpoints while the evaluation runs."""
        start = time.monotonic()
        for member in self.members:
            if member.status in KEPT and member.tokens > member.segment.start_tokens:
                self.writer.begin(member)
        if self.members:
            self.share("checkpoint", time.monotonic() - start)

    def _saved(self, member: Member) -> str | None:
        try:
            return self.writer.saved(member)
        except OSError as error:  # a full disk: the neighbours' checkpoints may still have fitted
            member.status, member.detail = "unwritten", str(error)
            self.evaluated.pop(member.segment.trial_id, None)
            return None


def _ids(group: Sequence[Member]) -> list[int]:
    return [member.segment.trial_id for member in group]


def _no_room(members: Sequence[Member], shop: Shop) -> str:
    """Why the members' checkpoints cannot be written, as far as that shows before anything is trained."""
    weights = sum(w.numel() for m in members for w in m.adapter.weights().values())
    need = CHECKPOINT_BYTES * weights + FILES_BYTES * len(members)
    try:
        free = shutil.disk_usage(shop.checkpoint_path).free
    except OSError as error:
        return str(error)
    return f"{free} bytes are free in {shop.checkpoint_path}, {need} are needed" if free < need else ""


def train_gang(
    base: Any,
    segments: Sequence[Segment],
    shop: Shop,
    eval_examples: int,
    load_seconds: float = 0.0,
    course: Sequence[Stint] = (),
) -> list[SegmentResult]:
    """Train the segments together; results in their order. Afterwards the base is bare again.

    A diverged trial is a result, and so is one that does not fit into memory. Every other exception is
    the caller's to translate, and the base must then be loaded again. ``load_seconds``: what loading the
    base took, for the members to share. ``course``: train exactly so, and not as it turns out.
    """
    timer = Timer()
    training = GangTraining.set_up(base, segments, shop)
    training.share("load", load_seconds + timer.lap("load"))
    if not course:
        training.train()
    elif not training.broken:
        training.repeat(course)
    timer.lap("train")
    if shop.stopping():  # the time is for the checkpoints; what is missing is evaluated when they go on
        for member in training.members:
            member.status = "cancelled" if member.status == "ok" else member.status
    with training.writer:
        training.begin_saving()
        timer.lap("checkpoint")
        training.evaluate(eval_examples)
        training.share("evaluate", timer.lap("evaluate"))
        results = {member.segment.trial_id: training.result(member) for member in training.members}
    found = [results.get(s.trial_id) or training.broken[s.trial_id] for s in segments]
    training.members.clear()  # their memory is for the answers
    return [_graded(base, s, result, shop) for s, result in zip(segments, found, strict=True)]


def _graded(base: Any, segment: Segment, result: SegmentResult, shop: Shop) -> SegmentResult:
    """The result with what the metric gives to the answers of its checkpoint, where that is asked for."""
    if not segment.answers or not shop.has_metric or result.status != "ok" or not result.checkpoint_out:
        return result
    timer = Timer()
    folder = checkpoint_in(shop.checkpoint_path, result.checkpoint_out)
    values, detail = metric_of(base, folder, segment, shop)
    seconds = {**result.seconds, "score": timer.lap("score")}
    detail = "; ".join(filter(None, (result.detail, detail)))
    status = "cancelled" if segment.only_grades and shop.stopping() else result.status
    return replace(result, metric=values, seconds=seconds, detail=detail, status=status)
