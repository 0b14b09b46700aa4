"""Histories by hand: a small ledger in memory, written event by event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from budgetsearch.core.decisions import Run
from budgetsearch.core.events import (
    Calibrated,
    Charged,
    Closed,
    Decided,
    Entry,
    Event,
    Exported,
    Opened,
    Planned,
    Scored,
    SegmentEnded,
    SegmentStarted,
    TrialAdded,
)
from budgetsearch.core.history.fold import apply
from budgetsearch.core.history.history import History
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.jobs import new_trial
from budgetsearch.core.ports import Proposal, Watcher
from budgetsearch.core.records import Calibration, Params, Schedule, Score, Segment, SegmentResult, TrainJob
from budgetsearch.core.space.space import Space

SPACE: Mapping[str, Any] = {
    "name": "test",
    "dimensions": {
        "quantization": {"kind": "choice", "values": ["fp32", "nf4"]},
        "rank": {"kind": "choice", "values": [4, 8, 16, 32], "ordered": True},
        "learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True},
        "alpha": {"kind": "tied", "to": "rank", "factor": 2},
        "dropout": {"kind": "choice", "values": [0.0, 0.05]},
    },
}
MODEL = {"source": "org/tiny", "loadable": "org/tiny", "revision": "main", "sha256": "ab", "licence": "MIT"}
FACTS: Mapping[str, Any] = {
    "card": {"name": "cpu", "device": "cpu"},
    "model": MODEL,
    "data": {
        "source_sha256": "cd",
        "template": "plain",
        "train": {"rows": 90},
        "valid": {"rows": 10},
        "valid_rows_sha256": "rows",
        "valid_tokens_sha256": "tokens",
    },
    "versions": {"torch": "2.9.0", "peft": "0.21.0"},
}
RATES = {"fp32": 100.0, "nf4": 50.0}


def params(rank: int = 8, rate: float = 1e-3, quantization: str = "fp32") -> Params:
    """A configuration of ``SPACE``."""
    return {
        "quantization": quantization,
        "rank": rank,
        "learning_rate": rate,
        "alpha": 2 * rank,
        "dropout": 0.0,
    }


def plan(space: Mapping[str, Any] = SPACE, **changes: Any) -> Plan:
    """A plan with rungs of 10, 30 and 90 seconds."""
    values: dict[str, Any] = {
        "budget_seconds": 720.0,
        "gpu": "cpu",
        "space": Space.parse(space).to_dict(),
        "seed": 0,
        "eta": 5,
        "ladder": (10.0, 30.0, 90.0),
        "reference_rates": RATES,
        "micro_batches": dict.fromkeys(RATES, 4),
        "overheads": dict.fromkeys(RATES, 1.0),
        "checkpoint_seconds": dict.fromkeys(RATES, 0.5),
        "load_seconds": dict.fromkeys(RATES, 1.0),
        "max_tokens": 100_000,
        "batch_size": 8,
        "step_tokens": 80.0,
        "eval_examples": 16,
        "task_examples": 4,
        "reserve_seconds": 60.0,
        "score_seconds": 40.0,
        "checkpoint_every_seconds": 60.0,
        "max_trials": 200,
    }
    return Plan(**{**values, **changes})


@dataclass
class Story:
    """Appends events as a driver would, one second apart; tells watchers."""

    history: History = field(default_factory=History)
    entries: list[Entry] = field(default_factory=list)
    watchers: list[Watcher] = field(default_factory=list)

    @classmethod
    def planned(cls, **changes: Any) -> Story:
        """A run that has been opened, calibrated and planned."""
        story = cls()
        story.open(**changes)
        return story

    def open(self, **changes: Any) -> None:
        """Open, calibrate and plan."""
        self.add(Opened(720.0, {"seed": 0, "gpu": "cpu"}, FACTS), Charged("setup", 1.0))
        for name, rate in RATES.items():
            self.add(Calibrated(Calibration(name, "ok", rate, micro_batch=4)), Charged("calibrate", 1.0))
        self.add(Planned(plan(**changes)))

    def add(self, *events: Event) -> None:
        """Append events."""
        for event in events:
            seq = len(self.entries) + 1
            entry = Entry(seq, self.history.spent + isinstance(event, Charged), 1e9 + seq, event)
            self.entries.append(entry)
            apply(self.history, entry)
            for watcher in self.watchers:
                watcher.see(entry, self.history)

    def trial(self, configuration: Params | None = None, origin: str = "prior") -> int:
        """Add a configuration; returns its number."""
        number = len(self.history.trials)
        assert self.history.plan is not None
        proposal = Proposal(configuration or params(), origin)
        self.add(TrialAdded(new_trial(self.history.plan, number, proposal)))
        return number

    def start(self, trial_id: int, rung: int = 0, reason: str = "new trial", micro_batch: int = 1) -> Segment:
        """Decide and start a segment towards a rung."""
        assert self.history.plan is not None
        state = self.history.trials[trial_id]
        full = rung == self.history.plan.top_rung
        goal = state.trial.rung_tokens[rung]
        segment = Segment(
            trial_id=trial_id,
            params=state.trial.params,
            seed=state.trial.seed,
            rung=rung,
            start_tokens=state.tokens,
            stop_tokens=goal,
            schedule=Schedule(10, goal, goal // 5 if full else 0),
            batch_size=8,
            micro_batch=micro_batch,
            checkpoint_in=state.checkpoint,
        )
        job = TrainJob(self.history.next_job, (segment,), 16, 100.0)
        self.add(Decided(self.history.spent, 1, Run(job, (reason,))), SegmentStarted(job.job_id, segment))
        return segment

    def end(
        self,
        segment: Segment,
        loss: float | None = None,
        status: str = "ok",
        detail: str = "",
        micro_batch: int | None = None,
        **more: Any,
    ) -> None:
        """End a segment; ``more``: other fields of its result."""
        job_id = next(job for job, some in self.history.running.items() if segment in some)
        result = SegmentResult(
            trial_id=segment.trial_id,
            rung=segment.rung,
            status=status,  # type: ignore[arg-type]
            tokens=segment.stop_tokens if status == "ok" else segment.start_tokens,
            loss=loss,
            seconds={"train": 1.0},
            peak_bytes=2**30,
            checkpoint_out=checkpoint_name(segment) if status == "ok" else None,
            detail=detail,
            micro_batch=micro_batch,
        )
        result = replace(result, **more)
        self.add(SegmentEnded(job_id, result), Charged("train", 1.0, segment.trial_id))

    def train(self, trial_id: int, loss: float, rung: int = 0, reason: str = "new trial") -> None:
        """A segment from start to end."""
        self.end(self.start(trial_id, rung, reason), loss)

    def finish(self) -> None:
        """Score, export and close."""
        score = Score(
            "ok",
            "fp32",
            base_loss=2.0,
            adapter_loss=0.9,
            base_accuracy=0.25,
            adapter_accuracy=0.75,
            task_examples=4,
            samples=({"prompt": "1 + 1?", "reference": "2", "base": "3", "adapter": "2", "grading": "text"},),
        )
        best = self.history.incumbent
        assert best is not None
        self.add(best_scored(self.history, score), Charged("score", 1.0))
        self.add(Exported(best.trial_id, str(best.best_checkpoint), "runs/a/adapter", True))
        self.add(Closed("finished", "the budget is used"))


def best_scored(history: History, score: Score) -> Scored:
    """The best adapter has this score."""
    best = history.incumbent
    assert best is not None
    return Scored(score, best.trial_id, str(best.best_checkpoint))


def checkpoint_name(segment: Segment) -> str:
    """The name that the segment's checkpoint has."""
    return f"trial{segment.trial_id:04d}-rung{segment.rung}-tokens{segment.stop_tokens}-attempt0"


def whole_run() -> Story:
    """Six trials, one of them diverged and one infeasible; two promotions; one full run."""
    story = Story.planned()
    tell_run(story)
    return story


def tell_run(story: Story) -> None:
    """The events of ``whole_run`` after the plan."""
    for rank in (4, 8, 16, 32):
        number = story.trial(params(rank, 1e-3 * (1 + rank / 100)))
        story.train(number, 2.0 - rank / 32)
    story.end(story.start(story.trial(params(8, 9e-3))), status="diverged", detail="loss is not finite")
    story.end(story.start(story.trial(params(32, 2e-3, "nf4"))), status="out_of_memory", detail="too big")
    for place, number in enumerate((3, 2), start=1):
        story.train(number, 0.9 + place / 10, 1, f"promotion: place {place} of 6 at rung 0")
    story.train(3, 0.9, 2, "full run starts")
    story.finish()


# ------------------------------------------------------------------------ the history


def paused() -> Story:
    """Three trials at the first rung, the best of them also at the second."""
    story = Story.planned()
    for rank, loss in ((4, 1.5), (8, 1.2), (16, 1.4)):
        story.train(story.trial(params(rank)), loss)
    story.train(1, 1.0, 1, "promotion: place 1 of 3 at rung 0")
    return story
