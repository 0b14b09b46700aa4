"""Sequence classification: a language model with a head of its own, trained on labelled sentences.

Run it:  BASE_MODEL=HuggingFaceTB/SmolLM2-135M-Instruct \\
         budgetsearch run --recipe examples/recipes/sentences.py:Sentences --gpu cpu --hours 1
"""

import os
import random

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import budgetsearch as bs


def sentences(seed, count):
    """Comparisons that are true (1) or false (0); put your own labelled texts here."""
    chance = random.Random(seed)
    for _ in range(count):
        a, b = chance.sample(range(100), 2)
        yield f"{a} is larger than {b}.", int(a > b)


class Sentences(bs.Recipe):
    unit, metric, second_metric, length = "steps", "cross-entropy", "accuracy", 5000
    space = {
        "dimensions": {
            "learning_rate": {"kind": "float", "low": 1e-6, "high": 1e-3, "log": True},
            "head_rate": {"kind": "float", "low": 1.0, "high": 100.0, "log": True},
            "layers": {"kind": "choice", "values": [1, 2, 4], "ordered": True},
            "batch": {"kind": "choice", "values": [8, 16, 32], "ordered": True},
        }
    }

    def setup(self, device):
        self.name, self.device = os.environ.get("BASE_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct"), device
        self.tokenizer = AutoTokenizer.from_pretrained(self.name)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.train_rows, self.valid_rows = list(sentences(0, 4000)), list(sentences(1, 256))

    def start(self, params, seed):
        torch.manual_seed(seed)  # the head is random
        kind = AutoModelForSequenceClassification
        model = kind.from_pretrained(self.name, num_labels=2, dtype=torch.float32).to(self.device)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        model.requires_grad_(False)
        top = list(model.model.layers[-params["layers"] :].parameters())
        head = list(model.score.parameters())
        for weight in (*top, *head):
            weight.requires_grad_(True)
        groups = [{"params": top, "times": 1.0}, {"params": head, "times": params["head_rate"]}]
        return {"model": model, "adam": torch.optim.AdamW(groups), "params": dict(params), "seed": seed}

    def train(self, trial, units, until, course):
        model, params = trial["model"].train(), trial["params"]
        for step in range(units, until):
            chance = random.Random(f"{trial['seed']}/{step}")
            rows = chance.sample(self.train_rows, params["batch"])
            for group in trial["adam"].param_groups:
                group["lr"] = params["learning_rate"] * group["times"] * course.rate(step)
            loss = self._losses(model, rows).mean()
            trial["adam"].zero_grad()
            loss.backward()
            trial["adam"].step()
            course.tell(step + 1, loss.item())
            if course.should_stop():
                return step + 1
        return until

    def evaluate(self, trial):
        return self._over_valid(trial, self._losses)

    def second(self, trial):
        return self._over_valid(trial, self._hits)

    @torch.no_grad()
    def _over_valid(self, trial, of):
        model = trial["model"].eval()
        parts = [self.valid_rows[k : k + 32] for k in range(0, len(self.valid_rows), 32)]
        return torch.cat([of(model, part) for part in parts]).tolist()

    def _losses(self, model, rows):
        return functional.cross_entropy(*self._logits(model, rows), reduction="none")

    def _hits(self, model, rows):
        logits, labels = self._logits(model, rows)
        return (logits.argmax(dim=-1) == labels).float()

    def _logits(self, model, rows):
        texts, labels = zip(*rows, strict=True)
        batch = self.tokenizer(list(texts), return_tensors="pt", padding=True).to(self.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits, torch.tensor(labels, device=self.device)

    def save(self, trial, folder):
        trained = {name: w for name, w in trial["model"].named_parameters() if w.requires_grad}
        save_file(
            {name: w.detach().cpu().contiguous() for name, w in trained.items()},
            folder / "trained.safetensors",
        )
        states = trial["adam"].state_dict()["state"]
        adam = {f"{n}.{key}": value.cpu() for n, state in states.items() for key, value in state.items()}
        save_file(adam, folder / "adam.safetensors")

    def load(self, params, seed, folder):
        trial = self.start(params, seed)
        trial["model"].load_state_dict(load_file(folder / "trained.safetensors"), strict=False)
        weights = [w for group in trial["adam"].param_groups for w in group["params"]]
        for name, value in load_file(folder / "adam.safetensors").items():
            number, key = name.split(".")
            moved = value if key == "step" else value.to(self.device)
            trial["adam"].state[weights[int(number)]][key] = moved
        return trial

    def export(self, trial, folder):
        trial["model"].save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
