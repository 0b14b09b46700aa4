"""A run folder with checkpoints to export from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetsearch.run.export import AdapterExporter
from budgetsearch.storage.ownership import SIGN, claim
from budgetsearch.training.sums import META_FILE, SUMMED, describe
from tests.support.factories import FACTS, MODEL, Story


@dataclass
class House:
    """A run folder, its checkpoints and a model folder."""

    root: Path

    def __post_init__(self) -> None:
        (self.root / "run").mkdir(parents=True)
        claim(self.checkpoints, "mine")
        model = self.root / "model"
        model.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json"):
            (model / name).write_text(name, encoding="utf-8")
        for name in ("config.json", "model.safetensors"):
            (model / name).write_text("not the tokenizer's", encoding="utf-8")

    @property
    def checkpoints(self) -> Path:
        return self.root / "run" / "checkpoints"

    def checkpoint(self, name: str | None) -> None:
        folder = self.checkpoints / str(name)
        folder.mkdir()
        for file in SUMMED:
            (folder / file).write_text(f"{name}/{file}", encoding="utf-8")
        (folder / META_FILE).write_text(json.dumps(describe(folder)), encoding="utf-8")

    def exporter(self, *, keep: bool = False) -> AdapterExporter:
        return AdapterExporter(
            self.root / "run", self.checkpoints, MODEL, FACTS["data"], self.root / "model", keep, "mine"
        )

    def listing(self) -> set[str]:
        return {path.name for path in self.checkpoints.iterdir()} - {SIGN}


def best(story: Story) -> Any:
    """The incumbent."""
    assert story.history.incumbent is not None
    return story.history.incumbent
