"""Orders and results between driver and workers, as frozen dataclasses that ``core.codec`` makes JSON of.

What workers tell on the way is in ``core.reports``, what happens in ``core.events``. Units: seconds, bytes
and tokens throughout; a token is one position of a training row, prompt and completion alike, no padding.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from budgetsearch.core.bases import ModelSetup, cost_class
from budgetsearch.core.code import RecipeCode
from budgetsearch.core.course import Stint
from budgetsearch.core.metric import Values

ParamValue = str | int | float | bool
Params = Mapping[str, ParamValue]

Status = Literal[
    "ok", "out_of_memory", "diverged", "timeout", "crashed", "cancelled",
    "lost", "unread", "unwritten", "stranded", "refused",
]  # fmt: skip
"""How a piece of work ended. Only calibrations are ``refused``: this base model cannot be had so, or cannot
be trained, whoever tries it again. The four before are nobody's fault, and only segments end so: the
checkpoint to start from is missing or damaged (``lost``), is there and could not be read (``unread``), the
new one could not be written (``unwritten``), or the worker went away with its card or node (``stranded``)."""
Phase = Literal[
    "setup", "calibrate", "load", "train", "evaluate", "checkpoint", "score", "export",
    "idle", "crash", "down",
]  # fmt: skip
"""``down``: with a deadline, what passed between two processes of the run."""
PHASES: tuple[Phase, ...] = typing.get_args(Phase)


# --------------------------------------------------------------------------- work


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker must know before its first job; the first line on its pipe."""

    model_path: str
    """Folder of the base model, loadable by ``from_pretrained``."""
    model_name: str
    """What adapters name as their base: a Hub id, or the folder."""
    data_path: str
    """Folder of the prepared (tokenized) data."""
    checkpoint_path: str
    """Folder that holds all checkpoints of the run."""
    device: str
    """``cpu`` or ``cuda:N``."""
    targets: str
    """Modules that carry an adapter: ``all-linear``, or names joined by commas."""
    seed: int
    """Seed of the data order, the same for all trials."""
    card_uuid: str | None = None
    """What NVML knows the card by, or the slice of one; None on the CPU."""
    limit_bytes: int | None = None
    trust_remote_code: bool = False
    optimizer: str = "adamw"
    """``adamw`` (fp32), or ``adamw8bit``, whose blocks would straddle the members of a gang."""
    torch_compile: bool = False
    """Whether torch.compile runs the base's layers in training."""
    half: str = "bf16"
    """What the card computes in where 16 bits suffice: ``bf16``, or ``fp16`` on a card without its units."""
    shared: str = ""
    """Where checkpoints lie that several machines share: a folder, or a URL; empty: on this one."""
    recipe: RecipeCode | None = None
    """A training of the user's own in the place of that of adapters: there is no model and no data then."""
    metric: str = ""
    """What answers are graded by, beside the accuracy; empty: nothing. A function or a task may lie in ..."""
    metric_folder: str = ""
    worn: str = ""
    """Whatever a trial may put adapters on, for which base and calibration are made; empty: ``targets``."""
    models: tuple[ModelSetup, ...] = ()
    """Several base models: losses are then in nats per byte of the completion."""


@dataclass(frozen=True)
class Cancel:
    """Tells a worker to checkpoint the running job and stop it."""

    job_id: int


@dataclass(frozen=True)
class Schedule:
    """From this record alone the learning rate is a pure function of the tokens seen."""

    warmup_tokens: int
    """The rate rises linearly over these first tokens."""
    stop_tokens: int
    """Where the rate reaches zero, if there is a cooldown."""
    cooldown_tokens: int = 0
    """Length of the cooldown that ends at ``stop_tokens``; 0 while on the trunk."""
    shape: str = "sqrt"
    """How the rate falls in it: see ``core.schedule``."""
    share: float = 0.2
    """The part of a full run that cools down, where its end may still move."""


@dataclass(frozen=True)
class Revision:
    """From some token on another schedule holds: the full run trains faster or slower than foreseen."""

    tokens: int
    schedule: Schedule
    rate: float
    """Tokens per second then, as a share of those foreseen."""


@dataclass(frozen=True)
class Landing:
    """By when a segment of a full run must be done, and what was foreseen of it; see ``core.landing``."""

    seconds: float
    """From the start of its job: by then it has trained, is evaluated and has its checkpoint."""
    rate: float
    """Tokens per second of its training, as foreseen."""
    overhead_seconds: float
    """Evaluation and checkpoint, as foreseen; ..."""
    write_seconds: float
    """... of these the checkpoint."""
    longest: int
    """So many tokens its end may move to where training is faster."""


@dataclass(frozen=True)
class Segment:
    """The unit of work: one trial from one token count to another."""

    trial_id: int
    params: Params
    seed: int
    rung: int
    start_tokens: int
    stop_tokens: int
    schedule: Schedule
    batch_size: int
    """Effective batch in sequences: one optimizer step."""
    micro_batch: int
    """What a pass holds: so many rows as long as the longest, or more that are shorter (training.batches)."""
    checkpoint_in: str | None = None
    """Name of the checkpoint to start from, relative to the checkpoint folder."""
    attempt: int = 0
    recompute: bool = False
    """Whether activations are computed again in the backward pass (gradient checkpointing), ..."""
    plain_positions: int = 0
    """... but in passes of at most so many positions (rows x width)."""
    evaluate: bool = True
    """Whether its loss is measured at its end; most links of a full run only write a checkpoint."""
    landing: Landing | None = None
    """It ends itself by the clock; None: at ``stop_tokens``, however long that takes."""
    revisions: tuple[Revision, ...] = ()
    """Changes of its schedule that were made before, to be made again."""
    answers: int = 0
    """So many answers are graded by the metric at its end."""

    @property
    def only_grades(self) -> bool:
        """Answers of what is there are graded, and that is all."""
        return self.answers > 0 and not self.evaluate and self.start_tokens >= self.stop_tokens

    @property
    def goal_tokens(self) -> int:
        """Where the rung is reached: a full run is a chain of segments, and its end is the schedule's."""
        return self.schedule.stop_tokens if self.schedule.cooldown_tokens else self.stop_tokens

    def flown(self, revisions: Sequence[Revision]) -> Segment:
        """The segment with the end that it took in the end."""
        if not revisions:
            return self
        last = revisions[-1].schedule
        return replace(self, schedule=last, stop_tokens=last.stop_tokens)


@dataclass(frozen=True)
class TrainJob:
    """Train and evaluate segments on one resident base model, all of them at once: a gang."""

    job_id: int
    segments: tuple[Segment, ...]
    eval_examples: int
    limit_seconds: float
    limit_bytes: int | None = None
    course: tuple[Stint, ...] = ()
    """Train exactly so, as it was done before; nothing: as it turns out."""

    @property
    def quantization(self) -> str:
        """The base that all segments share, by its name."""
        return cost_class(self.segments[0].params)


@dataclass(frozen=True)
class CalibrateJob:
    """Load one quantization of the base and measure real training steps on it."""

    job_id: int
    quantization: str
    ranks: tuple[int, ...]
    """The largest is measured, for it takes the most memory; the next one if it does not fit."""
    batch_size: int
    limit_seconds: float
    micro_batches: tuple[tuple[int, int], ...] = ()
    """What should fit at each rank, plain and with checkpointing; nothing: the whole batch is tried."""
    dropout: float = 0.0
    """The largest that a configuration may ask for: it keeps masks and copies of its inputs."""
    limit_bytes: int | None = None
    max_gang: int = 1
    """So many members are tried at once, at most."""
    probe_seconds: float = 2.5
    """Steps of one probe are timed for so long."""
    task_examples: int = 0
    """How many answers will be graded in the end; with none, none are timed."""


@dataclass(frozen=True)
class ScoreJob:
    """Score base and adapter side by side, under the same quantization."""

    job_id: int
    quantization: str
    checkpoint: str
    eval_examples: int
    """How many losses to measure; 0 for none."""
    task_examples: int
    """How many answers to grade; 0 for none."""
    micro_batch: int
    """What fits: no pass takes more sequences."""
    limit_seconds: float
    """Answers are generated while this lasts."""
    further: bool = False
    """What is left of the limit goes to answers beyond those asked for: the more, the surer the accuracy."""


Job = TrainJob | CalibrateJob | ScoreJob
Order = WorkerSetup | TrainJob | CalibrateJob | ScoreJob | Cancel
"""A line on a worker's input."""

# ------------------------------------------------------------------------ results


@dataclass(frozen=True)
class SegmentResult:
    """What came of a segment."""

    trial_id: int
    rung: int
    status: Status
    tokens: int
    """Tokens that the trial has now seen in all."""
    loss: float | None = None
    """Mean cross-entropy per completion token on the validation subset (nats)."""
    example_losses: tuple[float, ...] = ()
    """Mean cross-entropy of each validation example, in their order; of the first where the time ended."""
    train_loss: float | None = None
    """Mean of the last eight steps' losses; ..."""
    train_noise: float = 0.0
    """... its standard error."""
    steps: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase: load, train, evaluate, checkpoint; members share training by their tokens, the rest alike."""
    peak_bytes: int = 0
    checkpoint_out: str | None = None
    detail: str = ""
    """Why it ended as it did, where there is something to say."""
    micro_batch: int | None = None
    """What it trained with in the end: less than the segment's where memory ran out."""
    gang: int = 1
    """How many trained at once in the end."""
    began: int = 0
    """How many of its job began to train, where the checkpoints of some could not be had; 0: all of them."""
    yielded: bool = False
    """Whether it went on with less because other processes left too little memory."""
    padding: float = 0.0
    """Share of the computed positions that were padding."""
    course: tuple[Stint, ...] = ()
    """Of its whole job: who trained side by side, and for how long; it makes the job repeatable."""
    computed_on: Mapping[str, str] = field(default_factory=dict)
    """What decides how sums round: processor or card, threads, versions (training.machine)."""
    revisions: tuple[Revision, ...] = ()
    """How its schedule was changed on the way."""
    metric: Values = ()
    """What the metric gave to each answer; of the first ones where the time ended."""


@dataclass(frozen=True)
class Probe:
    """What some real steps cost."""

    members: int
    """Adapters that trained at once."""
    micro_batch: int
    """Sequences of each."""
    recompute: bool
    """Whether gradient checkpointing was on."""
    length: int
    """Tokens of the longest row, with which the peak was found."""
    tokens_per_second: float
    """Of all members together."""
    peak_bytes: int


@dataclass(frozen=True)
class Calibration:
    """What real steps on one quantization cost."""

    quantization: str
    status: Status
    tokens_per_second: float = 0.0
    """Training alone, at ``micro_batch``: the reference rate of this cost class."""
    eval_seconds_per_example: float = 0.0
    checkpoint_seconds: float = 0.0
    load_seconds: float = 0.0
    answer_seconds: float = 0.0
    """One answer of full length by the bare base, in a batch like that of the scores; 0: not timed."""
    documents: int = 0  # of the task that is the metric, whose answers those were
    micro_batch: int = 1
    rank: int = 0
    """The largest rank that fits; 0: not measured."""
    recompute: bool = False
    """Whether gradient checkpointing pays."""
    gang: int = 1
    """Members of a gang at which the rate saturates, memory allowing."""
    probes: tuple[Probe, ...] = ()
    """Everything that was measured."""
    flops_per_token: float = 0.0
    """Forward and backward, without attention: 4 per frozen weight, 6 per trained one."""
    peak_bytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    measured: str = ""
    """When an earlier run measured it, as local time; empty: this run did."""

    @property
    def sound(self) -> bool:
        """A plan can rest on it: what must have taken time did, nothing took forever, and sizes are sizes."""
        rates = [self.tokens_per_second, *(probe.tokens_per_second for probe in self.probes)]
        times = (self.checkpoint_seconds, self.load_seconds, self.answer_seconds)
        largest = max((probe.members for probe in self.probes), default=1)
        return (
            self.status == "ok"
            and all(0 < value < math.inf for value in (*rates, self.eval_seconds_per_example))
            and all(0 <= value < math.inf for value in times)
            and min(self.micro_batch, self.gang) >= 1
            and self.gang <= largest
            and min(self.rank, self.peak_bytes, self.documents) >= 0
        )


@dataclass(frozen=True)
class Score:
    """Base against adapter on the same validation examples, under one quantization."""

    status: Status
    quantization: str
    base_loss: float | None = None
    adapter_loss: float | None = None
    base_example_losses: tuple[float, ...] = ()
    adapter_example_losses: tuple[float, ...] = ()
    example_tokens: tuple[int, ...] = ()
    """Completion tokens of each of these examples, or bytes: what it weighs in the mean losses."""
    base_accuracy: float | None = None
    adapter_accuracy: float | None = None
    task_examples: int = 0
    """How many answers stand behind the accuracies; the same examples for both."""
    base_grades: tuple[float, ...] = ()
    """Grade of each answer, 0 to 1, in the order of the validation rows."""
    adapter_grades: tuple[float, ...] = ()
    base_metric: Values = ()
    adapter_metric: Values = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    """A few examples: prompt, reference, base answer, adapter answer."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    computed_on: Mapping[str, str] = field(default_factory=dict)
    """As in a ``SegmentResult``."""

    def joined(self, answers: Score) -> Score:
        """These losses with the accuracies of a later score; a failed one changes only the detail."""
        if answers.status != "ok" or self.status != "ok":
            return replace(self, detail=" ".join(filter(None, (self.detail, answers.detail))))
        return replace(
            self,
            base_accuracy=answers.base_accuracy,
            adapter_accuracy=answers.adapter_accuracy,
            task_examples=answers.task_examples,
            base_grades=answers.base_grades,
            adapter_grades=answers.adapter_grades,
            base_metric=answers.base_metric,
            adapter_metric=answers.adapter_metric,
            samples=answers.samples,
            seconds={**self.seconds, **answers.seconds},
            detail=answers.detail,
        )
