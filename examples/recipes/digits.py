"""A small convolutional network on scikit-learn's digits, in plain PyTorch.

Run it:  budgetsearch run --recipe examples/recipes/digits.py:Digits --gpu cpu --hours 2m
"""

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import budgetsearch as bs


class Digits(bs.Recipe):
    unit, metric, warmup = "steps", "cross-entropy", 20
    space = {
        "dimensions": {
            "width": {"kind": "choice", "values": [8, 16, 32, 64], "ordered": True},
            "learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-1, "log": True},
            "weight_decay": {"kind": "float", "low": 1e-5, "high": 1e-1, "log": True},
            "dropout": {"kind": "float", "low": 0.0, "high": 0.6},
        }
    }

    def setup(self, device):
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16.0
        labels = torch.tensor(data.target)[order]
        self.train_set, self.valid_set = (images[450:], labels[450:]), (images[:450], labels[:450])

    def start(self, params, seed):
        torch.manual_seed(seed)
        width = params["width"]
        layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        net = nn.Sequential(*layers, nn.Dropout(params["dropout"]), nn.Linear(8 * width, 10))
        adam = torch.optim.AdamW(net.parameters(), weight_decay=params["weight_decay"])
        adam.step()  # makes its states, so that there is always something to save
        return {"net": net, "adam": adam, "rate": params["learning_rate"], "seed": seed}

    def train(self, trial, units, until, course):
        images, labels = self.train_set
        net = trial["net"].train()
        for step in range(units, until):
            torch.manual_seed(hash((trial["seed"], step)) % 2**31)  # a pause changes nothing
            rows = torch.randint(len(labels), (64,))
            for group in trial["adam"].param_groups:
                group["lr"] = trial["rate"] * course.rate(step)
            loss = functional.cross_entropy(net(images[rows]), labels[rows])
            trial["adam"].zero_grad()
            loss.backward()
            trial["adam"].step()
        course.tell(until, loss.item())

    @torch.no_grad()
    def evaluate(self, trial):
        images, labels = self.valid_set
        return functional.cross_entropy(trial["net"].eval()(images), labels, reduction="none").tolist()

    def save(self, trial, folder):
        save_file(trial["net"].state_dict(), folder / "network.safetensors")
        states = trial["adam"].state_dict()["state"]
        save_file(
            {f"{i}.{k}": v for i, s in states.items() for k, v in s.items()}, folder / "adam.safetensors"
        )

    def load(self, params, seed, folder):
        trial = self.start(params, seed)
        trial["net"].load_state_dict(load_file(folder / "network.safetensors"))
        for name, value in load_file(folder / "adam.safetensors").items():
            number, key = name.split(".")
            trial["adam"].state[list(trial["net"].parameters())[int(number)]][key] = value
        return trial
