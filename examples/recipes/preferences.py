"""Preference tuning with TRL's DPOTrainer: every trial is an adapter on one resident base.

Run it:  BASE_MODEL=HuggingFaceTB/SmolLM2-135M-Instruct \\
         budgetsearch run --recipe examples/recipes/preferences.py:Preferences --gpu cpu --hours 1
"""

import os
import random
import tempfile

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

import budgetsearch as bs

BATCH = 4


def pairs(seed, count):
    """Sums, with a right answer that is preferred to a wrong one; put your own pairs here."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = chance.randrange(50), chance.randrange(50)
        wrong = a + b + chance.choice([-2, -1, 1, 2])
        rows.append({"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {wrong}"})
    return rows


class Preferences(bs.Recipe):
    unit, metric, piece, length = "steps", "DPO loss", 20.0, 2000
    space = {
        "dimensions": {
            "rank": {"kind": "choice", "values": [4, 8, 16], "ordered": True},
            "learning_rate": {"kind": "float", "low": 1e-6, "high": 1e-3, "log": True},
            "beta": {"kind": "float", "low": 0.03, "high": 0.5, "log": True},
        }
    }

    def setup(self, device):
        disable_progress_bars()
        name = os.environ.get("BASE_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
        self.base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.on_cpu = device == "cpu"
        self.train_rows, self.valid_rows = pairs(0, 2000), pairs(1, 64)

    def start(self, params, seed):
        return {"params": dict(params), "seed": seed, "weights": None, "adam": None}

    def train(self, trial, units, until, course):
        many = len(self.train_rows)
        rows = [self.train_rows[k % many] for k in range(units * BATCH, until * BATCH)]
        trainer = self._trainer(trial, rows, until - units)
        weights = [w for w in trainer.model.parameters() if w.requires_grad]
        adam = torch.optim.AdamW(weights, lr=trial["params"]["learning_rate"], weight_decay=0.0)
        for number, state in enumerate(trial["adam"] or ()):
            adam.state[weights[number]] = {key: value.clone() for key, value in state.items()}
        trainer.optimizer = adam
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: course.rate(units + k))
        trainer.train()
        trial["weights"] = {
            k: v.detach().clone() for k, v in get_peft_model_state_dict(trainer.model).items()
        }
        trial["adam"] = [adam.state[w] for w in weights]
        self.base = trainer.model.unload()

    def evaluate(self, trial):
        trainer = self._trainer(trial, self.train_rows[:BATCH], 1)
        loss = trainer.evaluate()["eval_loss"]
        self.base = trainer.model.unload()
        return loss

    def _trainer(self, trial, rows, steps):
        """A trainer whose model is the base with the trial's adapter; without that it is the reference."""
        params = trial["params"]
        config = DPOConfig(
            output_dir=tempfile.gettempdir(),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=16,
            train_sampling_strategy="sequential",  # the order is that of the rows
            beta=params["beta"],
            seed=trial["seed"],
            use_cpu=self.on_cpu,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        adapter = LoraConfig(r=params["rank"], lora_alpha=2 * params["rank"], target_modules="all-linear")
        trainer = DPOTrainer(
            self.base,
            args=config,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(self.valid_rows),
            processing_class=self.tokenizer,
            peft_config=adapter,
        )
        trainer.remove_callback(PrinterCallback)
        if trial["weights"] is not None:
            set_peft_model_state_dict(trainer.model, trial["weights"])
        return trainer

    def save(self, trial, folder):
        weights = trial["weights"] or {"none": torch.zeros(1)}
        save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / "adapter_model.safetensors")
        states = enumerate(trial["adam"] or ())
        adam = {f"{n}.{key}": value.cpu() for n, state in states for key, value in state.items()}
        save_file(adam, folder / "adam.safetensors")

    def load(self, params, seed, folder):
        trial = self.start(params, seed)
        weights = load_file(folder / "adapter_model.safetensors")
        trial["weights"] = None if "none" in weights else weights
        states = {}
        for name, value in load_file(folder / "adam.safetensors").items():
            number, key = name.split(".")
            states.setdefault(int(number), {})[key] = value
        trial["adam"] = [states[number] for number in sorted(states)] or None
        return trial

    def export(self, trial, folder):
        self.save(trial, folder)
        (folder / "adam.safetensors").unlink()
        params = trial["params"]
        LoraConfig(
            r=params["rank"],
            lora_alpha=2 * params["rank"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base.config._name_or_path,
        ).save_pretrained(folder)
