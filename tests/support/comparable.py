"""Run folders by hand, for what reads them: a ledger on disk, written event by event."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from budgetsearch.core.events import CardWatched, Closed, Event, Exported, Opened
from budgetsearch.core.records import Score
from budgetsearch.core.reports import CardUse
from budgetsearch.storage.ledger import Ledger
from budgetsearch.storage.runfolder import MANIFEST_FILE
from tests.support.factories import FACTS, Story, best_scored, params

DATA: Mapping[str, Any] = {
    "source_sha256": "source",
    "prepared": "prepared",
    "valid_rows_sha256": "rows",
    "valid_tokens_sha256": "tokens",
    "template": "chat",
}
BASE = (2.0, 3.0, 4.0, 3.5, 2.5, 3.0, 2.0, 4.0)
GOOD = (0.5, 0.9, 1.0, 0.8, 0.6, 0.7, 0.4, 1.1)
TARGETS = (1, 2, 3, 4, 1, 2, 3, 4)


class Standing:
    """A clock that stands still: the ledger keeps the entries' own times."""

    at = 0.0

    def now(self) -> float:
        """The time it was set to."""
        return self.at


def put_adapter(run: Path, checkpoint: str) -> Path:
    """An adapter in the folder of a run that says that it was made from this checkpoint."""
    adapter = run / "adapter"
    adapter.mkdir()
    (adapter / MANIFEST_FILE).write_text(json.dumps({"checkpoint": checkpoint}), encoding="utf-8")
    (adapter / "adapter_model.safetensors").touch()
    return adapter


def score(
    adapter: Sequence[float] = GOOD,
    base: Sequence[float] = BASE,
    targets: Sequence[int] = TARGETS,
    grades: Sequence[float] = (1.0, 1.0, 0.0, 1.0),
    base_grades: Sequence[float] = (0.0, 0.0, 0.0, 1.0),
    quantization: str = "fp32",
) -> Score:
    """A final score with its examples."""
    return Score(
        "ok",
        quantization,
        base_loss=sum(base) / len(base),
        adapter_loss=sum(adapter) / len(adapter),
        base_example_losses=tuple(base),
        adapter_example_losses=tuple(adapter),
        example_tokens=tuple(targets),
        base_grades=tuple(base_grades),
        adapter_grades=tuple(grades),
        task_examples=len(grades),
    )


def write_run(
    path: Path,
    scored: Score | None = None,
    *,
    data: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    joules: float | None = None,
    finished: bool = True,
    quantization: str = "fp32",
) -> Path:
    """A run folder with a ledger: one trial, its score, what the watcher saw, and the end."""
    story = Story.planned()
    story.train(story.trial(params(8, quantization=quantization)), 1.0)
    opened = story.entries[0].event
    assert isinstance(opened, Opened)
    known = {**FACTS, "data": {**DATA, **(data or {})}, **(facts or {})}
    events: list[Event] = [replace(opened, facts=known, settings={**opened.settings, **(settings or {})})]
    events += [entry.event for entry in story.entries[1:]]
    events.append(CardWatched(0, CardUse(10, 3 * 2**30, joules=joules)))
    if scored is not None:
        events.append(best_scored(story.history, scored))
    if finished:
        best = story.history.incumbent
        assert best is not None
        events.append(Exported(best.trial_id, str(best.best_checkpoint), str(path / "adapter"), True))
        events.append(Closed("finished", "the budget is used"))
    path.mkdir(parents=True)
    ledger, clock = Ledger(path / "ledger.sqlite"), Standing()
    times = [entry.at for entry in story.entries]
    for place, event in enumerate(events):
        clock.at = times[min(place, len(times) - 1)]
        ledger.append(event, clock)
    ledger.close()
    return path
