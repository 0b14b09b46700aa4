"""A trial in training: its adapter, its optimizer, and where it stands in the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from budgetsearch.core.landing import Pilot
from budgetsearch.core.records import Params, Segment, Status
from budgetsearch.core.schedule import rate_factor
from budgetsearch.storage.ownership import checkpoint_in
from budgetsearch.training import checkpoints
from budgetsearch.training.adapters import Adapter
from budgetsearch.training.batches import DataOrder, passes, width_step
from budgetsearch.training.gang import Tensors

if TYPE_CHECKING:
    from budgetsearch.training.data.store import TokenSet
    from budgetsearch.training.data.tokens import PreparedData
    from budgetsearch.training.metric import Grader
    from budgetsearch.training.task_metric import TaskMetric


CLIP_NORM = 1.0
"""Gradient norm of one adapter is clipped here (recipes use 0.3 to 1)."""
BETAS = (0.9, 0.999)
RATIO = "lr_ratio"
"""In a group of the optimizer: its rate over that of the configuration."""
OPTIMIZER = "optimizer/"
"""Before the names of the optimizer's tensors in a checkpoint."""
LOSS_SCALE = 2.0**12
"""In fp16 small gradients would vanish, so the loss is scaled up before the backward pass (like GradScaler).
A power of two changes nothing else, and a step whose gradient overflows is made again with half of it."""
DIVERGED_FACTOR = 3.0
"""A training loss so many times its first value, over several steps, has diverged."""


@dataclass(frozen=True)
class Shop:
    """What every segment of a run shares."""

    data: PreparedData
    model_path: Path
    checkpoint_path: Path
    device: str
    targets: str
    base_name: str
    seed: int
    pad: int
    beat: Callable[[int | None, str, int, float | None], None]
    """(trial, activity, tokens, loss): a sign of life."""
    stopping: Callable[[], bool]
    """Whether the job was told to checkpoint and stop."""
    peak_bytes: Callable[[], int]
    """Since the job began, or the last ``start_peak``."""
    start_peak: Callable[[], None] = lambda: None
    optimizer: str = "adamw"
    torch_compile: bool = False
    half: str = "bf16"
    """The 16-bit type that the device computes in."""
    worn: str = ""
    """Whatever a trial may put adapters on; empty: ``targets``."""
    trust_remote_code: bool = False
    """Whether code that came with the base model may run."""
    bytes_of: tuple[int, ...] = ()
    """Bytes of each validation row's completion: losses are per byte of them; nothing: per token."""
    grader: Grader | None = None
    """The metric by which answers to validation rows are graded; None: the run has none, or ..."""
    task: TaskMetric | None = None
    """... it is a task with documents of its own."""
    make_room: Callable[[], bool] = lambda: False
    """Give up what the job does not need, such as another resident base; whether there was anything."""
    pressed: Callable[[], str] = lambda: ""
    """Whether memory is nearly full: OWN if this process comes near its cap in a step, OTHERS if others leave
    too little although what nobody holds was given back; else nothing."""
    other_bases: Callable[[], int] = lambda: 0
    """Bytes of resident bases that the job does not need."""
    elapsed: Callable[[], float] = lambda: 0.0
    """Seconds since the job began."""
    notice: Callable[[str], None] = lambda text: None
    """Tell the user something, in a sentence."""

    @property
    def has_metric(self) -> bool:
        """Whether the run chooses by something else than the loss."""
        return self.grader is not None or self.task is not None

    def weights(self, count: int) -> list[int]:
        """What each of the first ``count`` validation rows weighs in a mean loss: its tokens, or bytes."""
        return list(self.bytes_of[:count]) or [self.data.valid.targets(row) for row in range(count)]

    def measured(self, losses: Sequence[float]) -> list[float]:
        """Losses of the first validation rows, from nats per token to what they are compared by."""
        if not self.bytes_of:
            return list(losses)
        targets = map(self.data.valid.targets, range(len(losses)))
        return [loss * n / size for loss, n, size in zip(losses, targets, self.bytes_of, strict=False)]


OWN, OTHERS = "memory was nearly full", "others left too little memory"
"""Why less has to be done at a time before the allocator fails."""


class Diverged(Exception):
    """The training loss or the weights are not finite any more, or ran away."""


@dataclass(eq=False)
class Member:
    """A trial that trains, alone or beside others: nothing here depends on its neighbours."""

    shop: Shop
    segment: Segment
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    rows: TokenSet
    """What it trains on."""
    order: DataOrder
    micro_batch: int
    plain_positions: int = 0
    """Passes of at most so many go without the gradient checkpointing of its kind."""
    tokens: int = 0
    steps: int = 0
    status: Status | None = None
    """None while there is more to do."""
    detail: str = ""
    recent: list[float] = field(default_factory=list)
    """Training losses of this segment's steps."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Its share of the time, by phase."""
    scale: float = 1.0
    """Of the loss in the backward pass."""
    positions: int = 0
    """Positions computed for it in this segment, padding included."""
    _pending: list[list[int]] = field(default_factory=list)
    """Micro-batches of the step under way."""
    _losses: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pilot = Pilot(self.segment)

    @classmethod
    def set_up(cls, base: Any, segment: Segment, shop: Shop) -> Member:
        """A fresh trial, or one that goes on exactly where its checkpoint stopped."""
        if segment.checkpoint_in:
            saved = checkpoints.load(checkpoint_in(shop.checkpoint_path, segment.checkpoint_in))
            adapter = Adapter.saved(saved, segment.params, shop.device)
            member = cls._new(segment, shop, adapter)
            member._restore(saved)
            if member.tokens >= segment.stop_tokens:
                member.status = "ok"  # only its evaluation is missing
            return member
        adapter = Adapter.fresh(
            base, segment.params, targets=shop.targets, seed=segment.seed, base_name=shop.base_name
        )
        return cls._new(segment, shop, adapter)

    @classmethod
    def _new(cls, segment: Segment, shop: Shop, adapter: Adapter) -> Member:
        optimizer = make_optimizer(shop.optimizer, adapter.weights(), segment.params)
        longest = segment.params.get("max_length")
        rows = shop.data.train if longest is None else shop.data.train_to(int(longest))
        order = DataOrder(rows.lengths, segment.batch_size, shop.seed)
        sizes = segment.micro_batch, segment.plain_positions
        member = cls(shop, segment, adapter, optimizer, rows, order, *sizes)
        member.scale = LOSS_SCALE if shop.half == "fp16" and shop.device != "cpu" else 1.0
        return member

    def skip_to(self, tokens: int) -> None:
        """Go to a place in the data without training."""
        while self.tokens < tokens:
            self.tokens += int(self.order.lengths[self.order.step_rows(self.steps)].sum())
            self.steps += 1

    # ------------------------------------------------------------------------- a step

    def next_rows(self) -> list[int]:
        """The next micro-batch of the step under way, or of the next step."""
        if not self._pending:
            self.begin_step(self.order.step_rows(self.steps))
        return self._pending[0]

    def begin_step(self, rows: Sequence[int]) -> None:
        """The next optimizer step is on these rows of the training data."""
        self._pending = self._passes(rows)
        self._losses = []
        self._targets = sum(self.rows.targets(row) for row in rows)
        self._tokens = int(self.rows.lengths[rows].sum())

    def _passes(self, rows: Sequence[int]) -> list[list[int]]:
        step = width_step(self.shop.device)
        return passes(self.order, rows, self.micro_batch, step, self.plain_positions)

    @property
    def rows_under_way(self) -> int:
        """Rows of the micro-batch that ``next_rows`` returned last."""
        return len(self._pending[0]) if self._pending else 0

    def rows_ahead(self) -> list[int]:
        """The micro-batch that follows the one under way, unless its step has to begin again."""
        return self._pending[0] if self._pending else self._passes(self.order.step_rows(self.steps + 1))[0]

    def width_of(self, rows: Sequence[int]) -> int:
        """The longest of these rows, in tokens."""
        return int(max(self.order.lengths[row] for row in rows))

    @property
    def most_positions(self) -> int:
        """Rows x width that a micro-batch of it may hold."""
        return max(1, self.micro_batch) * self.order.longest

    @property
    def step_targets(self) -> int:
        """Trained tokens of the step: the loss is their mean, whatever the micro-batches are."""
        return self._targets

    @property
    def mask_seed(self) -> str:
        """What this micro-batch's dropout masks depend on, and nothing else does."""
        return f"{self.segment.seed}/{self.steps}/{len(self._pending)}"

    def take(self, loss: torch.Tensor) -> bool:
        """The micro-batch has run backward; returns whether the step is complete."""
        self._losses.append(loss)
        del self._pending[0]
        return not self._pending

    def measure(self) -> torch.Tensor:
        """(loss, gradient norm) of the complete step, still on the device; the gradients are clipped."""
        weights = list(self.adapter.weights().values())
        if self.scale != 1.0:
            torch._foreach_mul_([w.grad for w in weights], 1.0 / self.scale)
        norm = torch.nn.utils.clip_grad_norm_(weights, float(self.segment.params.get("clip_norm", CLIP_NORM)))
        return torch.stack([torch.stack(self._losses).sum().double(), norm.double()])

    def finish_step(self, loss: float, norm: float) -> None:
        """One step of AdamW, if what ``measure`` found is finite; if the scale may be to blame, the step
        begins again with half of it.

        Raises:
            Diverged: it is not, or the loss ran away.
        """
        if self.scale > 1.0 and math.isfinite(loss) and not math.isfinite(norm):
            self.scale /= 2.0
            self.clear()
            return
        self._check(loss, norm)
        peak = float(self.segment.params["learning_rate"])
        for group in self.optimizer.param_groups:
            group["lr"] = group[RATIO] * peak * rate_factor(self.pilot.schedule, self.tokens)
        self.optimizer.step()
        self.adapter.changes += 1
        self.clear()
        self.steps += 1
        self.tokens += self._tokens
        self.adapter.update_average(self.steps)
        change = self.pilot.look(self.tokens, self.shop.elapsed())
        if change and (told := self.pilot.news(change)):
            self.shop.notice(told)
        if self.tokens >= self.pilot.stop:
            self.status = "ok"

    def make_states(self) -> None:
        """What the optimizer keeps of a worn adapter exists from here on, as after a step."""
        self.optimizer.step()  # at a rate of zero, on gradients that are zero
        for state in self.optimizer.state.values():
            state["step"] = state["step"] * 0

    def clear(self) -> None:
        """Forget the gradients and whatever was done of a step that is not complete."""
        self._pending, self._losses = [], []
        grads = [w.grad for w in self.adapter.weights().values() if w.grad is not None]
        if grads:
            torch._foreach_zero_(grads)

    def _check(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"loss {loss}, gradient norm {norm} at step {self.steps + 1}")
        self.recent.append(loss)
        first = self.recent[0]
        if len(self.recent) >= 8 and min(self.recent[-4:]) > DIVERGED_FACTOR * max(first, 1.0):
            raise Diverged(f"the training loss rose from {first:.3g} to {loss:.3g} by step {self.steps + 1}")

    def charge(self, phase: str, seconds: float) -> None:
        """Add to its share of the time."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    # -------------------------------------------------------------------- checkpoints

    def save(self) -> str:
        """Write a checkpoint; returns its name."""
        name, write = self.snapshot()
        write()
        return name

    def snapshot(self) -> tuple[str, Callable[[], None]]:
        """(the name of a checkpoint, what writes it): as things stand now, whatever is trained or evaluated
        before it is written. Writing touches no tensor of the card's and none of the trial's."""
        segment = self.segment
        name = f"trial{segment.trial_id:04d}-rung{segment.rung}-tokens{self.tokens}-attempt{segment.attempt}"
        write = partial(
            checkpoints.save,
            self.shop.checkpoint_path / name,
            adapter=_copies(self.adapter.exportable()),
            config=self.adapter.config,
            tensors=_copies(self._state()),
            progress=checkpoints.Progress(self.tokens, self.steps),
        )
        if self.shop.device != "cpu":
            torch.cuda.synchronize(self.shop.device)  # the copies are there
        return name, write

    def _state(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, weight in self.adapter.weights().items():
            tensors[f"weight/{name}"] = weight
            for key, value in self.optimizer.state[weight].items():
                if key != "step":  # as many as the trial has taken
                    tensors[f"{OPTIMIZER}{key}/{name}"] = value
        return tensors

    def _restore(self, saved: checkpoints.Saved) -> None:
        self.tokens, self.steps = saved.progress.tokens, saved.progress.steps
        device, weights = self.shop.device, self.adapter.weights()
        whole = isinstance(self.optimizer, torch.optim.AdamW)
        step = torch.tensor(float(self.steps), device=device) if whole else self.steps
        for weight in weights.values():
            self.optimizer.state[weight] = {"step": step.clone() if whole else step}  # type: ignore[union-attr]
        for name, tensor in saved.tensors.items():
            if name.startswith(OPTIMIZER):
                key, _, where = name.removeprefix(OPTIMIZER).partition("/")
                self.optimizer.state[weights[where]][key] = tensor.to(device)


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in the computer's memory, each with a storage of its own: pinned for those that come from a
    card, which does not wait for one after the other."""
    found = {}
    for name, tensor in tensors.items():
        card = tensor.device.type != "cpu"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=card)
        found[name] = copy.copy_(tensor.detach(), non_blocking=card)
    return found


def make_optimizer(name: str, weights: Tensors, params: Params) -> torch.optim.Optimizer:
    """AdamW; its rate is set before each step, for B so many times that of A as LoRA+ says."""
    ratio, decay = float(params.get("lora_plus_ratio", 1.0)), float(params.get("weight_decay", 0.0))
    kinds = [(1.0, "")] if ratio == 1.0 else [(1.0, "/A"), (ratio, "/B")]
    groups = [
        {"params": [w for n, w in weights.items() if n.endswith(kind)], RATIO: times} for times, kind in kinds
    ]
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=0.0, betas=BETAS, weight_decay=decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=decay, fused=True)
