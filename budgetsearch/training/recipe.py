"""The training recipe of one segment, in phases: set up, train, evaluate, save, clean up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from budgetsearch.core.records import Segment, SegmentResult, Status
from budgetsearch.core.schedule import rate_factor
from budgetsearch.training import checkpoints
from budgetsearch.training.adapters import Adapter
from budgetsearch.training.batches import DataOrder, micro_batches
from budgetsearch.training.evaluate import EVAL_BATCH, example_losses, mean_loss
from budgetsearch.training.losses import token_losses

if TYPE_CHECKING:
    from budgetsearch.training.tokens import PreparedData

CLIP_NORM = 1.0
"""Gradient norm of one adapter is clipped here (recipes use 0.3 to 1)."""
BETAS = (0.9, 0.999)
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
    beat: Callable[[str, int, float | None], None]
    """(activity, tokens, loss): a sign of life."""
    stopping: Callable[[], bool]
    """Whether the job was told to checkpoint and stop."""
    peak_bytes: Callable[[], int]


class Timer:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.monotonic()

    def lap(self, phase: str) -> None:
        """Charge the time since the last lap to ``phase``."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._mark
        self._mark = now


class Diverged(Exception):
    """The training loss or the weights are not finite any more, or ran away."""


@dataclass
class TrialTraining:
    """A trial on its resident base: adapter, optimizer, and where it stands in the data."""

    shop: Shop
    segment: Segment
    adapter: Adapter
    optimizer: torch.optim.AdamW
    order: DataOrder
    tokens: int = 0
    steps: int = 0
    recent: list[float] = field(default_factory=list)
    """Training losses of this segment's steps."""

    @classmethod
    def set_up(cls, base: Any, segment: Segment, shop: Shop) -> TrialTraining:
        """A fresh trial, or one that goes on exactly where its checkpoint stopped."""
        adapter = Adapter(
            base, segment.params, targets=shop.targets, seed=segment.seed, base_name=shop.base_name
        )
        optimizer = torch.optim.AdamW(adapter.weights.values(), lr=0.0, betas=BETAS, weight_decay=0.0)
        order = DataOrder(len(shop.data.train), segment.batch_size, shop.seed)
        training = cls(shop, segment, adapter, optimizer, order)
        torch.manual_seed(segment.seed)  # the dropout stream starts here, whatever the initialisation drew
        if segment.checkpoint_in:
            training._restore(checkpoints.load(shop.checkpoint_path / segment.checkpoint_in))
        return training

    def train(self) -> Status:
        """Steps until the segment's last token; ok, or cancelled if told to stop.

        Raises:
            Diverged: the loss or the gradient is not finite, or the loss ran away.
        """
        self.adapter.model.train()
        while self.tokens < self.segment.stop_tokens:
            if self.shop.stopping():
                return "cancelled"
            self.step_on(self.order.step_rows(self.steps))
            self.shop.beat("train", self.tokens, self.recent[-1])
        return "ok"

    def step_on(self, rows: Sequence[int]) -> None:
        """One optimizer step on these rows of the training data.

        Raises:
            Diverged: the loss or the gradient is not finite, or the loss ran away.
        """
        batches = list(micro_batches(self.shop.data.train, rows, self.segment.micro_batch, self.shop.pad))
        targets = sum(batch.targets for batch in batches)
        total = 0.0
        for batch in batches:
            # The token mean over the effective batch, whatever the micro-batches: same gradient.
            loss = token_losses(self.adapter.model, batch.to(self.shop.device)).sum() / targets
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.weights.values(), CLIP_NORM)
        self._check(total, float(norm))
        peak = float(self.segment.params["learning_rate"])
        for group in self.optimizer.param_groups:
            group["lr"] = peak * rate_factor(self.segment.schedule, self.tokens)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += sum(batch.tokens for batch in batches)
        self.adapter.update_average(self.steps)

    def _check(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"loss {loss}, gradient norm {norm} at step {self.steps + 1}")
        self.recent.append(loss)
        first = self.recent[0]
        if len(self.recent) >= 8 and min(self.recent[-4:]) > DIVERGED_FACTOR * max(first, 1.0):
            raise Diverged(f"the training loss rose from {first:.3g} to {loss:.3g} by step {self.steps + 1}")

    def evaluate(self, count: int) -> tuple[float, tuple[float, ...]]:
        """(mean loss per token, loss of each example) with the averaged weights.

        Raises:
            Diverged: the loss is not finite.
        """
        self.adapter.model.eval()
        with self.adapter.averaged():
            losses, targets = example_losses(
                self.adapter.model,
                self.shop.data.valid,
                count,
                pad=self.shop.pad,
                device=self.shop.device,
                batch=min(EVAL_BATCH, self.segment.micro_batch),
            )
        mean = mean_loss(losses, targets)
        if not math.isfinite(mean):
            raise Diverged(f"validation loss {mean}")
        return mean, tuple(losses)

    def save(self) -> str:
        """Write a checkpoint; returns its name."""
        segment = self.segment
        name = f"trial{segment.trial_id:04d}-rung{segment.rung}-tokens{self.tokens}-attempt{segment.attempt}"
        config = {k: _plain(v) for k, v in self.adapter.model.peft_config["default"].to_dict().items()}
        checkpoints.save(
            self.shop.checkpoint_path / name,
            adapter=self.adapter.exportable(),
            config={**config, "inference_mode": True},
            tensors=self._state(),
            progress=checkpoints.Progress(self.tokens, self.steps),
        )
        return name

    def _state(self) -> dict[str, torch.Tensor]:
        tensors = {f"rng/{name}": state for name, state in _rng_states(self.shop.device).items()}
        for name, parameter in self.adapter.weights.items():
            tensors[f"weight/{name}"] = parameter.detach()
            tensors[f"average/{name}"] = self.adapter.average[name]
            moments = self.optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}/{name}"] = moments.get(key, torch.zeros_like(parameter.detach()))
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def _restore(self, saved: checkpoints.Saved) -> None:
        self.tokens, self.steps = saved.progress.tokens, saved.progress.steps
        device = self.shop.device
        tensors = saved.tensors
        self.adapter.load_weights({n: tensors[f"weight/{n}"] for n in self.adapter.weights})
        for name, parameter in self.adapter.weights.items():
            self.adapter.average[name].copy_(tensors[f"average/{name}"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.steps)),
                "exp_avg": tensors[f"exp_avg/{name}"].to(device),
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(device),
            }
        torch.set_rng_state(tensors["rng/cpu"])
        if "rng/cuda" in tensors and device != "cpu":
            torch.cuda.set_rng_state(tensors["rng/cuda"], device)


def train_segment(base: Any, segment: Segment, shop: Shop, eval_examples: int) -> tuple[SegmentResult, Any]:
    """Train one segment; returns its result and the bare base.

    A diverged trial is a result. Every other exception is the caller's to translate, and the base
    must then be loaded again.
    """
    timer = Timer()
    training = TrialTraining.set_up(base, segment, shop)
    timer.lap("load")
    status: Status = "ok"
    loss: float | None = None
    losses: tuple[float, ...] = ()
    name: str | None = None
    detail = ""
    try:
        status = training.train()
        timer.lap("train")
        if status == "ok":
            shop.beat("evaluate", training.tokens, None)
            loss, losses = training.evaluate(eval_examples)
            timer.lap("evaluate")
        if training.tokens > segment.start_tokens:
            name = training.save()
            timer.lap("checkpoint")
    except Diverged as error:
        status, detail = "diverged", str(error)
        timer.lap("train")
    recent = training.recent[-8:]
    bare = training.adapter.take_off()
    result = SegmentResult(
        trial_id=segment.trial_id,
        rung=segment.rung,
        status=status,
        tokens=training.tokens if name else segment.start_tokens,
        loss=loss,
        example_losses=losses,
        train_loss=sum(recent) / len(recent) if recent else None,
        steps=len(training.recent),
        seconds=timer.seconds,
        peak_bytes=shop.peak_bytes(),
        checkpoint_out=name,
        detail=detail,
    )
    return result, bare


def _rng_states(device: str) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device != "cpu":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _plain(value: Any) -> Any:
    """PEFT's configuration holds sets and enums: JSON has neither."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)
