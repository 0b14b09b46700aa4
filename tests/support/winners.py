"""Finished runs with an adapter that loads, made in a moment: nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from budgetsearch.core.events import Closed, Exported
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.export import AdapterExporter
from budgetsearch.run.manifest import write_manifest
from budgetsearch.run.prepare import prepare_inputs
from budgetsearch.storage.ledger import Ledger, read_history
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.training.data.provenance import input_facts
from budgetsearch.training.sums import META_FILE, STATE_FILE, describe
from tests.support.comparable import Standing, write_run

ALPHA = 8.0
"""Of the adapter: how far it moves the base."""


def make_winner(
    folder: Path, model: Path | str, rows: Path, *, quantization: str = "fp32", **settings: Any
) -> Path:
    """A finished run of a tiny model whose adapter has random weights; needs the cache's variable."""
    known = load_settings(
        {
            "model": str(model),
            "data": str(rows),
            "gpu": "cpu",
            "space": "lora_small",
            "hours": 0.2,
            **settings,
        },
        None,
        cwd=folder.parent,
    )
    base, data = prepare_inputs(known, lambda line: None)
    facts = {
        "model": {
            "source": known.model, "loadable": base.loadable, "revision": None, "sha256": base.sha256,
            "licence": "MIT", "anatomy": {"auto": True},
        },
        "data": {
            "source_sha256": data.source_sha256, "template": data.template,
            "chat_template": data.facts["chat_template"], "stops": data.facts["stops"],
            "train": asdict(data.train_stats), "valid": asdict(data.valid_stats),
            "licences": {rows.name: None}, **data.valid_hashes(),
        },
        "card": {"name": "the CPU", "device": "cpu", "usable_bytes": 16 * 2**30, "profile": "cpu"},
        "inputs": input_facts(base, data, {"data": known.data, "valid": known.valid}),
    }  # fmt: skip
    write_run(
        folder, settings=known.model_dump(mode="json"), facts=facts, data=facts["data"],
        quantization=quantization, finished=False,
    )  # fmt: skip
    RunFolder(folder).prepare(known.model_dump(mode="json"), "mine")
    _export(folder, base.path, quantization, facts)
    write_manifest(RunFolder(folder), read_history(folder / "ledger.sqlite"))
    return folder


def _export(folder: Path, base: Path, quantization: str, facts: Mapping[str, Any]) -> None:
    """Put the adapter of the best trial on disk as a run does, and end the run."""
    history = read_history(folder / "ledger.sqlite")
    best = history.incumbent
    assert best is not None
    checkpoint = folder / "checkpoints" / str(best.best_checkpoint)
    save_adapter(base, checkpoint, quantization)
    (checkpoint / STATE_FILE).write_bytes(b"not read here")
    (checkpoint / META_FILE).write_text(json.dumps(describe(checkpoint)), encoding="utf-8")
    exporter = AdapterExporter(folder.absolute(), checkpoint.parent, facts["model"], facts["data"], base)
    path = exporter.export(history, best, final=True)
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.append(Exported(best.trial_id, str(best.best_checkpoint), path, True), Standing())
    ledger.append(Closed("finished", "the budget is used"), Standing())
    ledger.close()


def save_adapter(base: Path, folder: Path, quantization: str = "fp32") -> None:
    """An adapter of random weights, B too: a fresh one would change nothing."""
    import torch
    from peft import LoraConfig, get_peft_model

    from budgetsearch.training.bases import load_base

    lora = LoraConfig(
        r=4, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        get_peft_model(load_base(str(base), quantization, "cpu"), lora).save_pretrained(folder)
