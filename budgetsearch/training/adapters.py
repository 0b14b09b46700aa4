"""A LoRA adapter on a resident base: put on, averaged, swapped, taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from budgetsearch.core.records import Params

AVERAGE_WINDOW = 8
"""w_avg += (9 / (t + 8)) * (w - w_avg): an average over about the last ninth of the steps, which
needs no horizon and has no warm-up lag."""


class Adapter:
    """One trial's LoRA weights on a base model; the base's own weights are never changed."""

    def __init__(self, base: Any, params: Params, *, targets: str, seed: int, base_name: str) -> None:
        """Put a fresh adapter on ``base``; its initial weights are a function of ``seed``."""
        from peft import LoraConfig, get_peft_model

        rank = int(params["rank"])
        config = LoraConfig(
            r=rank,
            lora_alpha=float(params.get("alpha", 2 * rank)),
            lora_dropout=float(params.get("dropout", 0.0)),
            target_modules=targets if targets == "all-linear" else targets.split(","),
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        self.model = get_peft_model(base, config)
        self.model.peft_config["default"].base_model_name_or_path = base_name
        self.weights: dict[str, torch.nn.Parameter] = {
            name: p for name, p in self.model.named_parameters() if p.requires_grad
        }
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}

    def update_average(self, step: int) -> None:
        """Take the weights after optimizer step ``step`` (from 1) into the average."""
        share = (AVERAGE_WINDOW + 1) / (step + AVERAGE_WINDOW)
        torch._foreach_lerp_(
            list(self.average.values()), [p.detach() for p in self.weights.values()], min(1.0, share)
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model computes with the averaged weights."""
        kept = {name: p.detach().clone() for name, p in self.weights.items()}
        self.load_weights(self.average)
        try:
            yield
        finally:
            self.load_weights(kept)

    def load_weights(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy the tensors into the adapter; names and shapes must be the adapter's own."""
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(tensors[name])

    def exportable(self) -> dict[str, torch.Tensor]:
        """The averaged weights under the names that ``PeftModel.from_pretrained`` expects."""
        from peft import get_peft_model_state_dict

        with self.averaged():
            state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
            return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}

    def take_off(self) -> Any:
        """The bare base again."""
        return self.model.unload()
