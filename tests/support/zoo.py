"""Plain loops that a family of models is compared with: nothing of this package trains in them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from budgetsearch.training.adapters import Adapter
from budgetsearch.training.anatomy import examine
from budgetsearch.training.bases import keep_bits, load_base
from budgetsearch.training.gang import Gang, Pass
from budgetsearch.training.modes import training_mode
from budgetsearch.training.parts import Parts
from budgetsearch.training.targets import KNOWN
from budgetsearch.views.loading import load_snippet, other_snippet
from tests.support.families import VOCAB

STEPS, RATE, LENGTH = 3, 1e-2, 12
MEMBERS = ({"rank": 4, "alpha": 8.0}, {"rank": 2, "alpha": 2.0})


def double(model: Any) -> Any:
    """The same in float64; fused experts multiply one by one, since torch groups only narrower types."""
    if Parts(getattr(model, "get_base_model", lambda: model)()).routed:
        getattr(model, "get_base_model", lambda: model)().set_experts_implementation("eager")
    return model.double()


def row_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each row."""
    logits = model(input_ids=ids, use_cache=False).logits
    flat = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1).mean(dim=1)


@dataclass
class Zoo:
    """A family's model in float64, two members that could train on it, and rows for each."""

    path: Path
    targets: str = "all-linear"

    def __post_init__(self) -> None:
        self.base = double(load_base(str(self.path), "fp32", "cpu"))
        self.known: Any = getattr(self.base, KNOWN)
        generator = torch.Generator().manual_seed(5)
        self.rows = [torch.randint(1, VOCAB - 20, (2, LENGTH), generator=generator) for _ in MEMBERS]
        self.fresh = [self._member(params, seed) for seed, params in enumerate(MEMBERS)]

    def _member(self, params: dict[str, Any], seed: int) -> Adapter:
        made = Adapter.fresh(self.base, params, targets=self.targets, seed=seed, base_name=str(self.path))
        for tensors in (made.a, made.b):
            for name, tensor in tensors.items():
                tensors[name] = torch.nn.Parameter(tensor.double())
        return made

    def train(
        self,
        numbers: Sequence[int],
        *,
        recompute: bool = False,
        after_forward: Callable[[], None] = lambda: None,
    ) -> tuple[torch.Tensor, list[Adapter]]:
        """(losses by step and member, the trained members) of these members side by side."""
        members = [copy.deepcopy(self.fresh[number]) for number in numbers]
        optimizers = [torch.optim.AdamW(list(m.weights().values()), lr=RATE) for m in members]
        ids, losses = torch.cat([self.rows[number] for number in numbers]), []
        now = Pass([2] * len(members), [LENGTH] * len(members), ["-"] * len(members), training=True)
        gang = Gang(self.base, members)
        with (
            training_mode(self.base, recompute=recompute, torch_compile=False),
            gang.worn(),
            gang.passing(now),
        ):
            for _ in range(STEPS):
                found = row_losses(self.base, ids).view(len(members), 2).mean(dim=1)
                after_forward()
                found.sum().backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=False)
                losses.append(found.detach())
        for member in members:
            member.average = {name: weight.detach().clone() for name, weight in member.weights().items()}
        return torch.stack(losses), members

    def textbook(self) -> torch.Tensor:
        """Losses of the first member by step, as PEFT alone trains it on a model of its own."""
        from peft import LoraConfig, get_peft_model

        config = self.fresh[0].config
        asked = {key: config[key] for key in ("r", "lora_alpha", "target_modules", "target_parameters")}
        base = self.plain()  # which draws random numbers of its own
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(**asked, task_type="CAUSAL_LM")).double()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
        losses = []
        for _ in range(STEPS):
            loss = row_losses(model, self.rows[0]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    def plain(self) -> Any:
        """The base as transformers alone loads it, frozen, in evaluation mode, in float64."""
        return double(type(self.base).from_pretrained(self.path).eval()).requires_grad_(False)

    def card(self, folder: Path, *, other: bool) -> float | None:
        """The loss of an exported adapter, loaded by the lines of its card; None where there are no such."""
        model = {"loadable": str(self.path), "anatomy": examine(self.path).facts()}
        lines = (other_snippet if other else load_snippet)(model, "fp32", str(folder), "cpu")
        if not lines:
            return None
        found: dict[str, Any] = {}
        exec("\n".join(line for line in lines if "AutoTokenizer." not in line), found)
        with torch.no_grad():
            return float(row_losses(double(found["model"].eval()), self.rows[0]).mean())

    def wearing(self, member: Adapter) -> float:
        """The loss that this package reports of a member."""
        gang = Gang(self.base, [member], gradients=False)
        with torch.no_grad(), gang.worn(), gang.passing(Pass([2], [LENGTH])):
            return float(row_losses(self.base, self.rows[0]).mean())


def four_bits(path: Path, folder: Path) -> tuple[float, list[float | None]]:
    """(the loss that this package reports of an adapter on a base in nf4, what its card's lines give)."""
    base = load_base(str(path), "nf4", "cpu")
    member = Adapter.fresh(base, MEMBERS[0], targets="all-linear", seed=0, base_name=str(path))
    for number, weight in enumerate(member.average.values()):
        weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(number))
    ids = torch.arange(1, 25).view(2, 12)
    gang = Gang(base, [member], gradients=False)
    with member.averaged(), torch.no_grad(), gang.worn(), gang.passing(Pass([2], [12])):
        said = float(row_losses(base, ids).mean())
    export(member, folder)
    model, got = {"loadable": str(path), "anatomy": examine(path).facts()}, []
    for snippet in (load_snippet, other_snippet):
        lines, found = snippet(model, "nf4", str(folder), "cpu"), {}
        exec("\n".join(line for line in lines if "AutoTokenizer." not in line), found)
        if lines:  # some processors would get weights of another form, and only of some shapes
            keep_bits(found["model"])
        with torch.no_grad():
            got.append(float(row_losses(found["model"].eval(), ids).mean()) if lines else None)
    return said, got


def export(member: Adapter, folder: Path) -> Path:
    """Write a member as the exporter does."""
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in member.exportable().items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(member.config), encoding="utf-8")
    return folder
