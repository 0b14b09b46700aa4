"""What a careful user does today: Optuna's TPE with successive halving over transformers' Trainer with PEFT.

python -m benchmarks.against.careful --model MODEL --rows train.jsonl --hours 0.2 --seed 0 --out FOLDER

60% of the time is for the search; then the best configuration is trained again with all that is left, on a
cosine schedule that ends there. It searches what budgetsearch searches on a CPU in fp32: rank, learning rate
and dropout, alpha tied to the rank, adapters on all linear layers.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from benchmarks.against.judge import encoded, loss_of, tokenizer_of
from benchmarks.against.rows import read_rows

SEARCH_SHARE = 0.6
TRIALS = 8
"""As many whole trials as the search would hold; with pruning it holds more."""
REPORTS = 8
"""A trial is evaluated so often, and may be pruned each time."""
VALID_SHARE, VALID_ROWS = 0.1, 64
MAX_EPOCHS = 4.0
LANDING_SECONDS = 5.0
"""For the last evaluation's end, saving and leaving."""
WARMUP_SHARE = 0.05


@dataclass
class Bench:
    """Everything that trials share."""

    model: str
    train: list[dict[str, Any]]
    valid: list[tuple[list[int], int]]
    batch: int
    seed: int
    out: Path
    pad: int

    def trainer(self, params: Mapping[str, Any], steps: int, callback: TrainerCallback) -> Trainer:
        """A Trainer of so many steps."""
        set_seed(self.seed)
        base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        config = LoraConfig(
            r=params["rank"],
            lora_alpha=2 * params["rank"],
            lora_dropout=params["dropout"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        arguments = TrainingArguments(
            output_dir=str(self.out / "trainer"),
            per_device_train_batch_size=self.batch,
            max_steps=max(1, steps),
            learning_rate=params["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=max(1, int(WARMUP_SHARE * steps)),
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=self.seed,
        )
        return Trainer(
            model=get_peft_model(base, config),
            args=arguments,
            train_dataset=self.train,
            data_collator=self.collate,
            callbacks=[callback],
        )

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A padded batch; only answers have labels."""
        width = max(len(row["ids"]) for row in rows)
        ids = [row["ids"] + [self.pad] * (width - len(row["ids"])) for row in rows]
        mask = [[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in rows]
        labels = [
            [-100] * row["asked"] + row["ids"][row["asked"] :] + [-100] * (width - len(row["ids"]))
            for row in rows
        ]
        named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.tensor(values) for name, values in named.items()}

    def loss(self, model: Any) -> float:
        """On the validation rows."""
        model.eval()
        found = loss_of(model, self.valid)
        model.train()
        return found


class Watch(TrainerCallback):  # type: ignore[misc]
    """Stops at a time, and reports the validation loss every so many steps."""

    def __init__(
        self, until: float, every: int = 0, report: Callable[[int, float], bool] = lambda step, loss: False
    ) -> None:
        self.until, self.every, self.report = until, every, report
        self.bench: Bench | None = None
        self.steps, self.begun = 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock of the rate starts here."""
        self.begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the clock and, now and then, at the loss."""
        self.steps = state.global_step
        late = time.monotonic() >= self.until
        if self.every and self.bench is not None and self.steps % self.every == 0 and not late:
            control.should_training_stop |= self.report(self.steps, self.bench.loss(model))
        control.should_training_stop |= late

    @property
    def rate(self) -> float:
        """Steps a second so far."""
        return self.steps / max(1e-9, time.monotonic() - self.begun)


def suggested(trial: optuna.Trial) -> dict[str, Any]:
    """A configuration, of budgetsearch's own small space."""
    return {
        "rank": trial.suggest_categorical("rank", [4, 8, 16, 32]),
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
        "dropout": trial.suggest_categorical("dropout", [0.0, 0.05]),
    }


def steps_for(rate: float, seconds: float, rows: int, batch: int) -> int:
    """Optimizer steps that fit, at the most ``MAX_EPOCHS`` over the rows."""
    return max(1, min(int(rate * seconds), int(MAX_EPOCHS * rows / batch)))


def searched(bench: Bench, until: float, rate: float, trial_seconds: float) -> tuple[dict[str, Any], float]:
    """(the best configuration of the search, steps a second of late)."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=bench.seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(),
    )
    rates = [rate]

    def objective(trial: optuna.Trial) -> float:
        steps = steps_for(rates[-1], trial_seconds, len(bench.train), bench.batch)
        last = [float("inf")]

        def report(step: int, loss: float) -> bool:
            trial.report(loss, step)
            last[0] = loss
            return bool(trial.should_prune())

        watch = Watch(until, max(1, steps // REPORTS), report)
        watch.bench = bench
        trainer = bench.trainer(suggested(trial), steps, watch)
        trainer.train()
        rates.append(watch.rate)
        if trial.should_prune():
            raise optuna.TrialPruned
        return last[0] if last[0] < float("inf") else bench.loss(trainer.model)

    while time.monotonic() < until:
        study.optimize(objective, n_trials=1)
    done = [one for one in study.trials if one.value is not None]
    return dict(study.best_params if done else study.trials[0].params), rates[-1]


def bench_of(model: str, rows: Path, batch: int, seed: int, out: Path) -> Bench:
    """The rows as tokens, a tenth of them for validation."""
    tokenizer = tokenizer_of(model)
    every = read_rows(rows)
    random.Random(seed).shuffle(every)
    count = max(1, int(VALID_SHARE * len(every)))
    coded = [encoded(tokenizer, row) for row in every]
    train = [{"ids": ids, "asked": asked} for ids, asked in coded[count:] if asked < len(ids)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Bench(model, train, coded[:count][:VALID_ROWS], batch, seed, out, int(pad or 0))


def first_rate(bench: Bench, until: float) -> float:
    """Steps a second of a few steps with a middling configuration."""
    watch = Watch(until)
    bench.trainer({"rank": 16, "learning_rate": 2e-3, "dropout": 0.0}, 3, watch).train()
    return watch.rate


def main() -> None:
    """Search, train again, save the adapter, print what was done as JSON."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    budget = 3600 * asked.hours
    bench = bench_of(asked.model, asked.rows, asked.batch, asked.seed, asked.out)
    search_until, until = began + SEARCH_SHARE * budget, began + budget - LANDING_SECONDS
    rate = first_rate(bench, search_until)
    best, rate = searched(bench, search_until, rate, SEARCH_SHARE * budget / TRIALS)
    watch = Watch(until)
    left = max(0.0, until - time.monotonic())
    trainer = bench.trainer(best, steps_for(rate, 0.9 * left, len(bench.train), asked.batch), watch)
    trainer.train()
    trainer.model.save_pretrained(str(asked.out / "adapter"))
    told = {"params": best, "steps": watch.steps, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
