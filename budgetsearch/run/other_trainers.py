"""Settings of other trainers, and how the same is said here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from budgetsearch.core.codec import read_json
from budgetsearch.core.space.knobs import KNOBS, SETTINGS

SEARCHED: Mapping[str, str] = {
    "quantization": "{kind: choice, values: [bf16, nf4]}",
    "rank": "{kind: choice, values: [8, 16, 32], ordered: true}",
    "learning_rate": "{kind: float, low: 5e-5, high: 5e-3, log: true, prior: {center: 5e-4, spread: 0.5}}",
    "alpha": "{kind: tied, to: rank, factor: 2}",
    "dropout": "{kind: constant, value: 0.05}",
}
"""A search space with one line for each knob."""
KNOB_NAMES: Mapping[str, tuple[str, str]] = {
    "learning_rate": ("learning_rate", "1e-4"),
    "lr": ("learning_rate", "1e-4"),
    "rank": ("rank", "16"),
    "r": ("rank", "16"),
    "lora_r": ("rank", "16"),
    "lora_rank": ("rank", "16"),
    "alpha": ("alpha", "32"),
    "lora_alpha": ("alpha", "32"),
    "dropout": ("dropout", "0.05"),
    "lora_dropout": ("dropout", "0.05"),
    "quantization": ("quantization", "nf4"),
    "quantize": ("quantization", "nf4"),
    "load_in_4bit": ("quantization", "nf4"),
    "load_in_8bit": ("quantization", "int8"),
    "qlora": ("quantization", "nf4"),
    "bf16": ("quantization", "bf16"),
    "dtype": ("quantization", "bf16"),
    "torch_dtype": ("quantization", "bf16"),
    "weight_decay": ("weight_decay", "0.01"),
    "warmup_steps": ("warmup_steps", "20"),
    "max_grad_norm": ("clip_norm", "0.3"),
    "clip_norm": ("clip_norm", "0.3"),
    "use_rslora": ("rslora", "true"),
    "rslora": ("rslora", "true"),
    "neftune_noise_alpha": ("neftune_alpha", "5"),
    "neftune_alpha": ("neftune_alpha", "5"),
    "loraplus_lr_ratio": ("lora_plus_ratio", "16"),
    "lora_plus_ratio": ("lora_plus_ratio", "16"),
}
"""The knob that a name means, and a value to show where none is given."""
EPOCHS = (
    "--max-epochs 3 bounds the passes over the data of a full run; how many there are, the budget decides"
)
TIME = "--hours 30m (or 2h, 1d) is the whole budget; steps and epochs follow from it"
BATCH = "--batch-size 16 is the effective batch; how many rows fit into memory at once is measured"
FIXED = "it is the same for every trial, and docs/training.md says what it is"
SAID: Mapping[str, str] = {
    "epochs": EPOCHS,
    "num_epochs": EPOCHS,
    "num_train_epochs": EPOCHS,
    "max_steps": TIME,
    "num_steps": TIME,
    "steps": TIME,
    "time": TIME,
    "minutes": TIME,
    "budget": TIME,
    "per_device_train_batch_size": BATCH,
    "micro_batch_size": BATCH,
    "gradient_accumulation_steps": BATCH,
    "model_name": "--model NAME",
    "model_name_or_path": "--model NAME",
    "base_model": "--model NAME",
    "dataset": "--data train.jsonl",
    "dataset_name": "--data hub:OWNER/NAME/FILE.jsonl",
    "train_file": "--data train.jsonl",
    "train_data": "--data train.jsonl",
    "eval_file": "--valid valid.jsonl",
    "validation_file": "--valid valid.jsonl",
    "test_size": "--valid-share 0.1",
    "output": "--out runs/mine",
    "output_dir": "--out runs/mine",
    "max_seq_length": "--max-length 1024",
    "max_seq_len": "--max-length 1024",
    "cutoff_len": "--max-length 1024",
    "target_modules": "--targets q_proj,v_proj",
    "lora_target_modules": "--targets q_proj,v_proj",
    "trials": "--max-trials 50",
    "n_trials": "--max-trials 50",
    "num_trials": "--max-trials 50",
    "search_space": "--space FILE.yaml",
    "report_to": "--log wandb",
    "resume_from_checkpoint": "`budgetsearch resume RUN` goes on with a run",
    "warmup_ratio": FIXED,
    "lr_scheduler_type": FIXED,
    "gradient_checkpointing": FIXED,
}
"""What to give instead, by the name."""


GENERAL = "What is not constant is searched; `budgetsearch spaces` lists files with ranges by model size."


def said_here(
    name: str,
    value: str | None = None,
    space: Mapping[str, Any] | None = None,
    more: Mapping[str, str] | None = None,
) -> str | None:
    """How to say here what other trainers call ``name``, with its ``value``; None: no such name is known.

    Args:
        name: the flag's or setting's name, with underscores.
        value: as it was given; None: nobody knows.
        space: the dimensions that the run would search; None: a general one.
        more: what else was given: all that is to be fixed stands in one answer.
    """
    if name in SAID:
        return f"there is no such setting here; instead: {SAID[name]}."
    if name not in KNOB_NAMES:
        return None
    given = {name: value, **{one: other for one, other in (more or {}).items() if one in KNOB_NAMES}}
    fixed = {KNOB_NAMES[one][0]: _fixed(one, text) for one, text in given.items()}
    searched = {one: _flow(spec) for one, spec in space.items()} if space else SEARCHED
    lines = {**searched, **{knob: f"{{kind: constant, value: {text}}}" for knob, text in fixed.items()}}
    return "\n".join(
        [
            f"the search decides {' and '.join(fixed)}. To fix {'it' if len(fixed) == 1 else 'them'}, save "
            "these lines as own.yaml and give --space own.yaml:",
            "",
            "dimensions:",
            *(f"  {one}: {text}" for one, text in lines.items()),
            "",
            "The others are those of the run's own space." if space else GENERAL,
        ]
    )


def _fixed(name: str, value: str | None) -> str:
    """The value that was given, or the usual one where that is none."""
    knob, usual = KNOB_NAMES[name]
    return value if value is not None and {**KNOBS, **SETTINGS}[knob][0](_scalar(value)) else str(usual)


def _flow(spec: Any) -> str:
    return str(yaml.safe_dump(spec, default_flow_style=True, sort_keys=False, width=math.inf)).strip()


def _scalar(text: str) -> str | int | float:
    try:
        value = read_json(text)
    except ValueError:
        return text
    return value if isinstance(value, (int, float)) else text
