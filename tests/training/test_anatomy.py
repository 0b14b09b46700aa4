"""What cannot be trained says so before anything is measured, in a few lines and with what works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from budgetsearch.core.errors import ModelError, SettingsError
from budgetsearch.machine.configs import find_shape
from budgetsearch.run.prepare import check_possible
from budgetsearch.training.anatomy import examine
from budgetsearch.training.bases import load_base
from budgetsearch.training.targets import targets_of
from tests.support.families import build, rewrite

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "float32",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model."""
    return build("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts of the kind whose names PEFT takes for those of fused experts."""
    return build("deepseek_v3", tmp_path_factory.mktemp("models") / "experts")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "writes no text"),
        ({"model_type": "t5", "is_encoder_decoder": True, "d_model": 64}, "encoder with a decoder"),
        ({"model_type": "no_such_family"}, "no_such_family|describes no model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "writes no text"),
    ],
    ids=["classifier", "encoder-decoder", "unknown", "masked"],
)
def test_what_is_no_language_model_is_refused_in_one_breath(
    llama: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """By its config.json alone, and without a list of all families."""
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(ModelError, match=message) as refused:
        examine(rewrite(tmp_path, **changes))
    assert len(str(refused.value)) < 600


def test_a_checkpoint_that_is_quantized_is_that_quantization_alone(llama: Path, tmp_path: Path) -> None:
    """The same base under four names would be compared with itself."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packed = AutoModelForCausalLM.from_pretrained(llama, quantization_config=BitsAndBytesConfig(**NF4))
    packed.save_pretrained(tmp_path)
    found = examine(tmp_path)
    assert {"fp32", "bf16", "int8"} == set(found.refused)
    assert found.weights == examine(llama).weights == find_shape(str(tmp_path), None, tmp_path)[0].weights
    with pytest.raises(ModelError, match="quantized already: it is nf4"):
        load_base(str(tmp_path), "fp32", "cpu")
    load_base(str(tmp_path), "nf4", "cpu")
    with pytest.raises(ModelError, match="Use a --space with nf4"):
        check_possible("the model", ("fp32", "bf16"), found.refused)


@pytest.mark.parametrize(
    ("method", "left"), [("fp8", {"fp32", "bf16"}), ("mxfp4", {"fp32", "bf16"}), ("gptq", set())]
)
def test_other_quantized_checkpoints_say_what_is_left(llama: Path, method: str, left: set[str]) -> None:
    """Unpacked where transformers can; else not at all. A plan knows it from config.json."""
    from budgetsearch.machine.anatomy import QUANTIZATIONS, checkpoint_of, refused_by

    config = {
        **json.loads((llama / "config.json").read_text()),
        "quantization_config": {"quant_method": method},
    }
    assert left == set(QUANTIZATIONS) - refused_by(checkpoint_of(config)).keys()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj,v_porj", r"'v_porj' names no layer .*did you mean 'v_proj'"),
        ("lm_head", "'lm_head' names no layer"),
    ],
)
def test_every_target_has_to_mean_a_layer(llama: Path, targets: str, message: str) -> None:
    """A misspelt one is not passed over in silence, by a plan neither."""
    with pytest.raises(SettingsError, match=message):
        examine(llama, targets=targets)
    with pytest.raises(SettingsError, match=message):
        find_shape(str(llama), None, llama)[0].check_targets(targets)


@pytest.mark.parametrize("targets", ["experts", "gate", "gate_up_proj"])
def test_routed_experts_and_routers_wear_no_adapters(experts: Path, targets: str) -> None:
    """Asked for by name they are refused, and it is said that none of them does."""
    with pytest.raises(SettingsError, match="Routed experts and their routers wear none here"):
        examine(experts, targets=targets)


def test_shared_experts_wear_adapters_in_16_bits_and_not_where_peft_could_not_load_them(
    experts: Path,
) -> None:
    """PEFT takes their names for fused experts': it is told parameters, which it cannot have quantized."""
    plain, packed = (load_base(str(experts), name, "cpu") for name in ("fp32", "nf4"))
    names = {"model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.up_proj"}
    assert names <= set(targets_of(plain, "all-linear").names)
    assert names.isdisjoint(targets_of(packed, "all-linear").names)
    assert any("PEFT" in why for why in targets_of(packed, "all-linear").left_out)


def test_a_base_without_all_its_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    """Weights that the checkpoint lacks would be random."""
    from safetensors.torch import load_file, save_file

    build("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights .*lm_head\.weight"):
        load_base(str(tmp_path), "fp32", "cpu")


def test_a_tower_that_text_does_not_reach_is_given_up(tmp_path: Path) -> None:
    """It costs memory and would teach nothing; the language part stays where the class has it."""
    base = load_base(str(build("mistral3", tmp_path)), "fp32", "cpu")
    assert [] == [name for name, _ in base.named_parameters() if "vision" in name or "projector" in name]
    ids = torch.arange(8).unsqueeze(0)
    assert base(input_ids=ids).logits.shape[:2] == (1, 8)
