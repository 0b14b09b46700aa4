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
    "warmup_ratio": ("warmup_steps", "20"),
    "schedule": ("schedule", "linear"),
    "cooldown": ("cooldown", "0.2"),
    "lr_scheduler_type": ("schedule", "linear"),
    "lr_scheduler": ("schedule", "linear"),
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
    "use --max-epochs 3: it bounds the passes over the data of a full run; how many there are, the budget "
    "decides"
)
TIME = "use --hours 30m (or 2h, 1d): it is the whole budget; steps and epochs follow from it"
BATCH = "use --batch-size 16: it is the effective batch; how many rows fit into memory at once is measured"
MODEL = "use --model NAME"
DATA = "use --data train.jsonl"
VALID = "use --valid valid.jsonl"
OUT = "use --out runs/mine"
LENGTH = "use --max-length 1024"
TARGETS = "use --targets q_proj,v_proj"
TRIALS = "use --max-trials 50"
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
    "model_name": MODEL,
    "model_name_or_path": MODEL,
    "base_model": MODEL,
    "dataset": DATA,
    "dataset_name": "use --data hub:OWNER/NAME/FILE.jsonl",
    "train_file": DATA,
    "train_data": DATA,
    "eval_file": VALID,
    "validation_file": VALID,
    "test_size": "use --valid-share 0.1",
    "output": OUT,
    "output_dir": OUT,
    "max_seq_length": LENGTH,
    "max_seq_len": LENGTH,
    "cutoff_len": LENGTH,
    "target_modules": TARGETS,
    "lora_target_modules": TARGETS,
    "trials": TRIALS,
    "n_trials": TRIALS,
    "num_trials": TRIALS,
    "search_space": "use --space FILE.yaml",
    "report_to": "use --log wandb",
    "resume_from_checkpoint": "`budgetsearch resume RUN` goes on with a run; give it the run's folder",
    "gradient_checkpointing": "give nothing: it is used where memory needs it or the calibration finds it "
    "faster",
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
        return f"there is no such setting here; {SAID[name]}."
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
