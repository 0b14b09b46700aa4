"""What a pass costs the host: 32 layers so narrow that Python and launches are all there is.

``python -m benchmarks.training.host`` times a forward and backward pass of plain PEFT and of ours on the same
rows, by turns, on one thread of the CPU. On a card the host has to be done before the card is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.training.common import write
from budgetsearch.training.adapters import Adapter
from budgetsearch.training.attention import agrees, unmasked
from budgetsearch.training.bases import read_together
from budgetsearch.training.batches import Batch
from budgetsearch.training.gang import Gang, Pass
from budgetsearch.training.losses import has_plain_head, target_losses
from budgetsearch.training.modes import training_mode
from budgetsearch.training.parts import Parts
from budgetsearch.training.targets import KNOWN, Known

LAYERS, WIDTH, RANK = 32, 16, 4
ROWS, LENGTH = 2, 8
TURNS = 9


def make_base() -> Any:
    """Random weights of a Mistral, frozen."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    base = MistralForCausalLM(config).requires_grad_(False).eval()
    base.config.use_cache = False
    return base


def ours(base: Any, members: int, recompute: bool, dropout: float) -> float:
    """Median seconds of a pass of so many members."""
    setattr(base, KNOWN, Known(together=read_together(base, Parts(base).linears)))
    has_plain_head(base)
    agrees(base)
    params = {"rank": RANK, "dropout": dropout}
    adapters = [
        Adapter.fresh(base, params, targets="all-linear", seed=k, base_name="-") for k in range(members)
    ]
    rows, places = ROWS * members, torch.arange(ROWS * members * LENGTH)
    rest: Mapping[str, Any] = {"tokens": (), "targets": (), "rows": (), "lengths": ()}
    ids = torch.ones((rows, LENGTH), dtype=torch.long)
    batch = Batch(ids=ids, places=places, labels=places % 64, **rest)
    now = Pass([ROWS] * members, [LENGTH] * members, ["0"] * members, training=True)
    gang = Gang(base, adapters)

    def step() -> None:
        with gang.passing(now), unmasked(base, LENGTH):
            target_losses(base, batch).sum().backward()

    with training_mode(base, recompute=recompute, torch_compile=False), gang.worn():
        return median(step)


def theirs(base: Any, recompute: bool, dropout: float) -> float:
    """Median seconds of PEFT's."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    if recompute:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    ids = torch.ones((ROWS, LENGTH), dtype=torch.long)
    mask, labels = torch.ones_like(ids), ids.reshape(-1)

    def step() -> None:
        logits = model(input_ids=ids, attention_mask=mask).logits
        cross_entropy(logits.reshape(len(labels), -1), labels).backward()

    return median(step)


def bare(base: Any) -> float:
    """Median seconds of the base without an adapter, down to the embeddings: what nobody can spare."""
    hidden = base.get_input_embeddings()(torch.ones((ROWS, LENGTH), dtype=torch.long)).requires_grad_()
    labels = torch.ones(ROWS * LENGTH, dtype=torch.long)

    def step() -> None:
        logits = base(inputs_embeds=hidden, use_cache=False).logits
        cross_entropy(logits.reshape(len(labels), -1), labels).backward()

    return median(step)


def median(step: Callable[[], None]) -> float:
    """Seconds of the processor: others on the machine do not count."""
    seconds = []
    for turn in range(TURNS + 2):
        start = time.process_time()
        step()
        if turn > 1:
            seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def main() -> None:
    """Write the JSON and print it."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"what": f"{LAYERS} layers {WIDTH} wide, {ROWS} rows of {LENGTH}, one thread"}
    for name, recompute, dropout in (
        ("plain", False, 0.0),
        ("dropout", False, 0.1),
        ("recompute", True, 0.0),
    ):
        base = bare(make_base())
        peft = theirs(make_base(), recompute, dropout)
        alone, eight = (ours(make_base(), members, recompute, dropout) for members in (1, 8))
        found[name] = {
            "milliseconds": {
                name: round(1e3 * seconds, 1)
                for name, seconds in (("base", base), ("PEFT", peft), ("ours", alone), ("gang of 8", eight))
            },
            "share_of_peft": round(alone / peft, 3),
            "adapters_alone_of_pefts": round((alone - base) / (peft - base), 3),
        }
    print(write("host-cpu", found).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
