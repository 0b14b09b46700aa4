"""What cannot be trained says so before anything is measured, in a few lines and with what works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from budgetsearch.core.errors import ModelError, SettingsError
from budgetsearch.machine.configs import find_shape
from budgetsearch.run.possible import check_possible
from budgetsearch.training.anatomy import examine
from budgetsearch.training.bases import load_base, probed
from budgetsearch.training.data.unpacking import unpack
from budgetsearch.training.parts import Parts
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
    with pytest.raises(ModelError, match=r"budgetsearch unpack .* Use a --space with nf4"):
        check_possible("the model", ("fp32", "bf16"), found.refused)


def test_an_unpacked_copy_can_be_had_of_every_quantization(llama: Path, tmp_path: Path) -> None:
    """It is the packed model's numbers in 16 bits, tokenizer included; what is not packed has none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    packed = AutoModelForCausalLM.from_pretrained(llama, quantization_config=BitsAndBytesConfig(**NF4))
    packed.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "packed")
    copy = unpack(tmp_path / "packed", tmp_path / "copy")
    assert ("", {}) == (examine(copy).checkpoint, examine(copy).refused)
    base, ids = load_base(str(copy), "fp32", "cpu"), torch.arange(1, 20).unsqueeze(0)
    original = load_base(str(tmp_path / "packed"), "nf4", "cpu")
    assert torch.allclose(base(input_ids=ids).logits, original(input_ids=ids).logits, atol=0.2)
    assert AutoTokenizer.from_pretrained(copy).get_vocab() == AutoTokenizer.from_pretrained(llama).get_vocab()
    load_base(str(copy), "nf4", "cpu")
    with pytest.raises(ModelError, match="is not quantized: use it as it is"):
        unpack(llama, tmp_path / "again")
    with pytest.raises(ModelError, match="is there already"):
        unpack(tmp_path / "packed", copy)
    rewrite(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="gptq, which is not unpacked here"):
        unpack(copy, tmp_path / "again")


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


@pytest.mark.parametrize("targets", ["gate", "gate_up_proj"])
def test_routers_wear_no_adapters_and_experts_by_their_set_alone(experts: Path, targets: str) -> None:
    """Asked for by another name they are refused, and it is said what there is."""
    with pytest.raises(SettingsError, match="Routed experts are --targets experts; routers wear none"):
        examine(experts, targets=targets)


def test_sets_of_targets_mean_the_same_to_a_plan_and_to_training(llama: Path, experts: Path) -> None:
    """Attention and MLP are all linear layers, each in one of them; experts are in neither; a dense model has
    none."""
    for path in (llama, experts):
        shape = find_shape(str(path), None, path)[0]
        found = {name: examine(path, targets=name) for name in ("all-linear", "attention", "mlp")}
        parts = [set(found[name].targets.names) for name in ("attention", "mlp")]
        assert all(parts)
        assert parts[0].isdisjoint(parts[1])
        assert set(found["all-linear"].targets.names) == parts[0] | parts[1]
        ranks = [shape.weights_per_rank(name) for name in found]
        assert ranks[0] == ranks[1] + ranks[2] == shape.weights_per_rank("attention,mlp")
    with pytest.raises(SettingsError, match="no routed experts"):
        examine(llama, targets="experts")
    with pytest.raises(SettingsError, match="no routed experts"):
        find_shape(str(llama), None, llama)[0].check_targets("attention,experts")
    both = examine(experts, targets="all-linear,experts")
    assert both.covered > examine(experts).covered
    assert "routers stay as they are" in both.sentence()
    assert "routed experts" not in both.sentence()


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


def test_linear_layers_of_a_class_of_their_own_are_not_promised_in_4_bits(tmp_path: Path) -> None:
    """transformers packs torch's own class alone, and says nothing of Falcon's."""
    path = build("falcon", tmp_path)
    assert {"nf4", "int8"} == set(examine(path).refused)
    with pytest.raises(ModelError, match=r"are FalconLinear .*that is not int8"):
        load_base(str(path), "int8", "cpu")


def test_a_router_that_is_a_linear_layer_wears_no_adapter(tmp_path: Path) -> None:
    """Llama 4's returns two tensors: nothing can be added to that."""
    found = examine(build("llama4", tmp_path))
    assert [] == [name for name in found.targets.names if "router" in name]


def test_a_tower_that_text_does_not_reach_is_given_up(tmp_path: Path) -> None:
    """It costs memory and would teach nothing; the language part stays where the class has it."""
    base = load_base(str(build("mistral3", tmp_path)), "fp32", "cpu")
    assert [] == [name for name, _ in base.named_parameters() if "vision" in name or "projector" in name]
    ids = torch.arange(8).unsqueeze(0)
    assert base(input_ids=ids).logits.shape[:2] == (1, 8)


def test_little_gradients_in_fp16_are_no_idle_layers() -> None:
    """Saturated attention under a large vocabulary: what a mean of logits leaves of them is zero there."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64_000}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(300)
        for block in model.model.layers:
            block.self_attn.q_proj.weight.mul_(15)
            block.mlp.down_proj.weight.mul_(30)
    model = model.half().eval().requires_grad_(False)
    linears = Parts(model).linears
    _, learning = probed(model, [], linears)
    assert set(linears) == learning
