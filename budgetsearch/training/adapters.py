"""A LoRA adapter as plain tensors: made by PEFT, averaged, written in PEFT's format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import CheckpointError, ModelError
from budgetsearch.core.records import Params
from budgetsearch.training.checkpoints import Saved
from budgetsearch.training.gang import Tensors
from budgetsearch.training.targets import targets_of

AVERAGE_WINDOW = 8
"""w_avg += (9 / (t + 8)) * (w - w_avg): an average over about the last ninth of the steps, which
needs no horizon and has no warm-up lag."""
PREFIX = "base_model.model."
"""What PEFT writes before the name of a layer."""


class Adapter:
    """One trial's LoRA weights and their average over the last steps."""

    def __init__(self, a: Tensors, b: Tensors, config: dict[str, Any]) -> None:
        """``config`` is PEFT's, as JSON holds it."""
        # In one order, fresh or from a file: layers are numbered by it, and sums run in it.
        self.a, self.b = dict(sorted(a.items())), dict(sorted(b.items()))
        self.config = config
        rank = int(config["r"])
        self.scale = float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self.dropout = float(config["lora_dropout"])
        self.changes = 0
        """How often the weights have changed since: whoever writes into them counts."""
        self.average = {name: weight.clone() for name, weight in self.weights().items()}

    @classmethod
    def fresh(cls, base: Any, params: Params, *, targets: str, seed: int, base_name: str) -> Adapter:
        """The adapter that PEFT would put on ``base`` after ``torch.manual_seed(seed)``."""
        from peft import LoraConfig, get_peft_model

        rank, chosen = int(params["rank"]), targets_of(base, str(params.get("targets", targets)))
        config = LoraConfig(
            r=rank,
            lora_alpha=float(params.get("alpha", 2 * rank)),
            use_rslora=bool(params.get("rslora", False)),
            # PEFT knows no dropout where it is told parameters; the gang's layers do.
            lora_dropout=0.0 if chosen.parameters else float(params.get("dropout", 0.0)),
            target_modules=chosen.modules,
            target_parameters=list(chosen.parameters) or None,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
        layers = {n.removeprefix(PREFIX): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        a = {name: m.lora_A["default"].weight.detach().clone() for name, m in layers.items()}
        b = {name: m.lora_B["default"].weight.detach().t().contiguous().clone() for name, m in layers.items()}
        found = {k: _plain(v) for k, v in model.peft_config["default"].to_dict().items()}
        model.unload()
        if set(a) != set(chosen.names):
            odd = sorted(set(a) ^ set(chosen.names))
            raise ModelError(
                f"PEFT does not put adapters where they belong in this model ({', '.join(odd[:3])}). "
                "Name the layers with --targets."
            )
        adapter = cls(a, b, {**found, "base_model_name_or_path": base_name, "inference_mode": True})
        adapter.dropout = float(params.get("dropout", 0.0))
        return adapter

    @classmethod
    def saved(cls, saved: Saved, params: Params, device: str) -> Adapter:
        """The adapter of a checkpoint of a trial with these ``params``, its average included."""
        weights = {
            n.removeprefix("weight/"): t.to(device)
            for n, t in saved.tensors.items()
            if n.startswith("weight/")
        }
        parts = {kind: {n[:-2]: w for n, w in weights.items() if n.endswith(kind)} for kind in ("/A", "/B")}
        adapter = cls(parts["/A"], parts["/B"], saved.config)
        for name in adapter.a:
            a, b = (saved.adapter[file_name(name, side)] for side in "AB")
            adapter.average[f"{name}/A"] = a.to(device)
            adapter.average[f"{name}/B"] = b.t().contiguous().to(device)
        adapter.dropout = float(params.get("dropout", 0.0))
        return adapter

    @property
    def on_experts(self) -> bool:
        """Whether routed experts wear it too: it has its rank for each of them."""
        return any(len(weight) != int(self.config["r"]) for weight in self.a.values())

    def weights(self) -> Tensors:
        """All tensors that are trained, ``LAYER/A`` and ``LAYER/B``."""
        return {f"{n}/A": w for n, w in self.a.items()} | {f"{n}/B": w for n, w in self.b.items()}

    def update_average(self, step: int) -> None:
        """Take the weights after optimizer step ``step`` (from 1) into the average."""
        share = (AVERAGE_WINDOW + 1) / (step + AVERAGE_WINDOW)
        torch._foreach_lerp_(list(self.average.values()), list(self.weights().values()), min(1.0, share))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the adapter's weights are the averaged ones."""
        weights = list(self.weights().values())
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, list(self.average.values()))
        self.changes += 1
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)
            self.changes += 1

    def exportable(self) -> Tensors:
        """The averaged weights with the names and the shapes that ``PeftModel.from_pretrained`` expects."""
        found = {}
        for name in self.a:
            found[file_name(name, "A")] = self.average[f"{name}/A"]
            found[file_name(name, "B")] = self.average[f"{name}/B"].t()
        return found


def file_name(layer: str, side: str) -> str:
    """PEFT's name for the A or the B of a layer."""
    return f"{PREFIX}{layer}.lora_{side}.weight"


OURS = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "target_parameters",
        "rank_pattern",
        "alpha_pattern",
    }
    | {"base_model_name_or_path", "inference_mode"}
)
"""What a configuration of ours decides; all else is PEFT's default for a LoRA adapter of a language model."""


def worn(base: Any, folder: Path) -> Any:
    """The base with the adapter in a folder on it, which may be a stranger's, as PEFT loads it.

    Raises:
        CheckpointError: its configuration asks for more than a plain LoRA adapter: PEFT imports modules,
            grows the base or reads other files where it is told to.
    """
    from peft import PeftModel

    path = folder / "adapter_config.json"
    try:
        check_plain(read_json(path.read_bytes()))
    except ValueError as error:
        raise CheckpointError(f"{path} is not that of an adapter of ours: {error}") from error
    # Left to itself PEFT reads onto the card, wherever there is one: also beside a base that is not there.
    device = str(base.get_input_embeddings().weight.device)
    model = PeftModel.from_pretrained(base, folder, is_trainable=False, torch_device=device)
    model.eval()
    return model


def check_plain(config: Any) -> None:
    """Insist on the configuration of a plain LoRA adapter.

    Raises:
        ValueError: it is none; names the key.
    """
    from peft import LoraConfig

    if not isinstance(config, dict):
        raise ValueError("it holds no mapping")
    usual = {key: _plain(value) for key, value in LoraConfig(task_type="CAUSAL_LM").to_dict().items()}
    for key, value in config.items():
        if key not in OURS and key != "peft_version" and value and value != usual.get(key):
            raise ValueError(f"it sets {key[:40]!r} to {str(value)[:80]!r}")


def _plain(value: Any) -> Any:
    """PEFT's configuration holds sets and enums: JSON has neither."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)
