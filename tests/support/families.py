"""Tiny random models of many families, built from their own configurations in transformers; no download."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.tiny import tiny_tokenizer

VOCAB = 300
BASE: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
}
SEES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
QWEN_SEES = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 8,
    "num_position_embeddings": 16,
}
QWEN_IMAGE = {
    "image_token_id": 290,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
}
GEMMA4 = {
    **BASE,
    **WINDOW,
    "head_dim": 16,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}


def without(*names: str) -> dict[str, Any]:
    """The common sizes but for these."""
    return {key: value for key, value in BASE.items() if key not in names}


@dataclass(frozen=True)
class Family:
    """How a family is built."""

    config: str
    """Class of its configuration in transformers."""
    sizes: Mapping[str, Any]
    model: str = ""
    """Class of the model; empty: what AutoModelForCausalLM takes."""
    parts: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None
    """Configurations inside: keyword to (class, sizes)."""
    kind: str = "dense"
    """Row of the table of docs/models.md that it belongs to."""


def _plain(config: str, **more: Any) -> Family:
    return Family(config, {**BASE, **more})


def _experts(config: str, **more: Any) -> Family:
    return Family(config, {**BASE, **more}, kind="experts")


def _hybrid(config: str, sizes: Mapping[str, Any]) -> Family:
    return Family(config, sizes, kind="hybrid")


def _wrapper(
    config: str, model: str, parts: Mapping[str, tuple[str, Mapping[str, Any]]], **more: Any
) -> Family:
    return Family(config, more, model, parts, kind="wrapper")


FAMILIES: Mapping[str, Family] = {
    "llama": _plain("LlamaConfig"),
    "llama_tied": _plain("LlamaConfig", tie_word_embeddings=True),
    "mistral": _plain("MistralConfig", sliding_window=16),
    "ministral3": _plain("Ministral3Config", head_dim=16),
    "qwen2": _plain("Qwen2Config", tie_word_embeddings=True),
    "qwen3": _plain("Qwen3Config", head_dim=16, tie_word_embeddings=True),
    "gemma2": _plain("Gemma2Config", head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
    "gemma3_text": _plain("Gemma3TextConfig", head_dim=16, query_pre_attn_scalar=16, **WINDOW),
    "gemma3n_text": _plain(
        "Gemma3nTextConfig",
        head_dim=16,
        **{**WINDOW, "intermediate_size": [128, 128]},
        laurel_rank=8,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "phi3": _plain("Phi3Config", sliding_window=16),
    "olmo2": _plain("Olmo2Config"),
    "olmo3": _plain("Olmo3Config", **WINDOW),
    "granite": _plain(
        "GraniteConfig", embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22
    ),
    "glm4": _plain("Glm4Config", head_dim=16),
    "smollm3": _plain("SmolLM3Config", tie_word_embeddings=True, no_rope_layers=[1, 0]),
    "cohere2": _plain("Cohere2Config", head_dim=16, logit_scale=0.25, **WINDOW),
    "exaone4": _plain("Exaone4Config", sliding_window_pattern=None, **WINDOW),
    "hunyuan_dense": _plain("HunYuanDenseV1Config", head_dim=16),
    "ernie4_5": _plain("Ernie4_5Config", head_dim=16),
    "nemotron": _plain("NemotronConfig", head_dim=16),
    "starcoder2": _plain("Starcoder2Config", sliding_window=16),
    "seed_oss": _plain("SeedOssConfig", head_dim=16),
    "stablelm": _plain("StableLmConfig"),
    "apertus": _plain("ApertusConfig"),
    "helium": _plain("HeliumConfig", head_dim=16),
    "arcee": _plain("ArceeConfig", head_dim=16),
    "gpt2": Family(
        "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 512}
    ),
    "gpt_neox": _plain("GPTNeoXConfig"),
    "bloom": Family(
        "BloomConfig",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "hidden_dropout": 0.1},
    ),
    "opt": Family(
        "OPTConfig",
        {
            **without("intermediate_size"),
            "word_embed_proj_dim": 64,
            "ffn_dim": 256,
            "dropout": 0.1,
            "init_std": 0.2,
        },
    ),
    "falcon": Family("FalconConfig", {**without(), "num_kv_heads": 2, "new_decoder_architecture": True}),
    "mixtral": _experts("MixtralConfig", **LOCAL),
    "qwen2_moe": _experts("Qwen2MoeConfig", **FEW, shared_expert_intermediate_size=32),
    "qwen3_moe": _experts("Qwen3MoeConfig", head_dim=16, **FEW),
    "olmoe": _experts("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "phimoe": _experts("PhimoeConfig", **LOCAL, sliding_window=None),
    "minimax_m2": _experts("MiniMaxM2Config", head_dim=16, **LOCAL, rotary_dim=8),
    "gpt_oss": _experts("GptOssConfig", head_dim=16, **LOCAL, **WINDOW),
    "deepseek_v3": _experts("DeepseekV3Config", **LATENT, first_k_dense_replace=1),
    "glm4_moe": _experts(
        "Glm4MoeConfig",
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "ernie4_5_moe": _experts(
        "Ernie4_5_MoeConfig",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=32,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=-1,
    ),
    "hunyuan_moe": _experts("HunYuanMoEV1Config", head_dim=16, num_experts=4, moe_topk=2),
    "lfm2_moe": _experts("Lfm2MoeConfig", layer_types=["conv", "full_attention"], **FEW, num_dense_layers=1),
    "gemma4_moe": Family(
        "Gemma4TextConfig",
        {
            **GEMMA4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        kind="experts",
    ),
    "dots1": _experts(
        "Dots1Config",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "flex_olmo": _experts("FlexOlmoConfig", num_experts=4, num_experts_per_tok=2),
    "hy_v3": _experts("HYV3Config", head_dim=16, **FEW, num_shared_experts=1, first_k_dense_replace=1),
    "laguna": _experts(
        "LagunaConfig",
        head_dim=16,
        **FEW,
        shared_expert_intermediate_size=32,
        sliding_window=16,
        layer_types=["full_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
    ),
    "minimax": _hybrid(
        "MiniMaxConfig",
        {**BASE, **LOCAL, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "rwkv": _hybrid(
        "RwkvConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB, "attention_hidden_size": 64},
    ),
    "granitemoehybrid": _hybrid(
        "GraniteMoeHybridConfig",
        {
            **BASE,
            **MAMBA,
            **LOCAL,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"],
            "position_embedding_type": "nope",
        },
    ),
    "qwen3_next": _hybrid(
        "Qwen3NextConfig", {**BASE, **LINEAR, "head_dim": 16, **FEW, "shared_expert_intermediate_size": 32}
    ),
    "falcon_h1": _hybrid(
        "FalconH1Config", {**BASE, **MAMBA, "mamba_d_ssm": 128, "ssm_multipliers": [1.0, 0.9, 1.1, 0.8, 1.0]}
    ),
    "bamba": _hybrid("BambaConfig", {**BASE, **MAMBA, "attn_layer_indices": [1]}),
    "jamba": _hybrid(
        "JambaConfig",
        {
            **without("max_position_embeddings"),
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "nemotron_h": _hybrid(
        "NemotronHConfig",
        {
            **without("num_hidden_layers"),
            "head_dim": 16,
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "lfm2": _hybrid(
        "Lfm2Config",
        {
            **BASE,
            "block_ff_dim": 128,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "zamba2": _hybrid(
        "Zamba2Config",
        {
            **without("num_key_value_heads"),
            "num_hidden_layers": 4,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "chunk_size": 16,
            "adapter_rank": 8,
            "num_mem_blocks": 1,
            "hybrid_layer_ids": [1, 3],
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "attention_head_dim": 32,
        },
    ),
    "mamba": _hybrid(
        "MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB, "state_size": 8}
    ),
    "mamba2": _hybrid(
        "Mamba2Config",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "vocab_size": VOCAB,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "expand": 2,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "mistral3": _wrapper(
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        {
            "text_config": ("MistralConfig", {**BASE, "head_dim": 16, "sliding_window": None}),
            "vision_config": (
                "PixtralVisionConfig",
                {**SEES, "head_dim": 16, "image_size": 28, "patch_size": 14},
            ),
        },
        image_token_index=290,
        spatial_merge_size=2,
    ),
    "gemma3": _wrapper(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": (
                "Gemma3TextConfig",
                {**BASE, **WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16},
            ),
            "vision_config": ("SiglipVisionConfig", {**SEES, "image_size": 28, "patch_size": 14}),
        },
        mm_tokens_per_image=1,
        image_token_index=290,
        boi_token_index=291,
        eoi_token_index=292,
    ),
    "gemma4": _wrapper(
        "Gemma4Config",
        "Gemma4ForConditionalGeneration",
        {
            "text_config": ("Gemma4TextConfig", GEMMA4),
            "vision_config": (
                "Gemma4VisionConfig",
                {
                    **SEES,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "patch_size": 8,
                    "position_embedding_size": 64,
                },
            ),
        },
        audio_config=None,
    ),
    "qwen3_vl": _wrapper(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": (
                "Qwen3VLTextConfig",
                {
                    **BASE,
                    "head_dim": 16,
                    "rope_parameters": {
                        "rope_type": "default",
                        "rope_theta": 10000.0,
                        "mrope_section": [4, 2, 2],
                        "mrope_interleaved": True,
                    },
                },
            ),
            "vision_config": ("Qwen3VLVisionConfig", {**QWEN_SEES, "deepstack_visual_indexes": [0]}),
        },
        **QWEN_IMAGE,
    ),
    "qwen3_5": _wrapper(
        "Qwen3_5Config",
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": (
                "Qwen3_5TextConfig",
                {**BASE, **LINEAR, "head_dim": 16, "tie_word_embeddings": True},
            ),
            "vision_config": ("Qwen3_5VisionConfig", QWEN_SEES),
        },
        **QWEN_IMAGE,
        tie_word_embeddings=True,
    ),
    "qwen3_5_moe": _wrapper(
        "Qwen3_5MoeConfig",
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": (
                "Qwen3_5MoeTextConfig",
                {
                    **without("intermediate_size"),
                    **LINEAR,
                    "head_dim": 16,
                    **FEW,
                    "shared_expert_intermediate_size": 32,
                },
            ),
            "vision_config": ("Qwen3_5MoeVisionConfig", QWEN_SEES),
        },
        **QWEN_IMAGE,
    ),
    "llama4": _wrapper(
        "Llama4Config",
        "Llama4ForConditionalGeneration",
        {
            "text_config": (
                "Llama4TextConfig",
                {
                    **BASE,
                    "head_dim": 16,
                    "intermediate_size_mlp": 128,
                    "num_local_experts": 4,
                    "num_experts_per_tok": 1,
                    "interleave_moe_layer_step": 1,
                    "attention_chunk_size": 64,
                },
            ),
            "vision_config": (
                "Llama4VisionConfig",
                {
                    **SEES,
                    "image_size": 28,
                    "patch_size": 14,
                    "vision_output_dim": 32,
                    "projector_input_dim": 32,
                    "projector_output_dim": 32,
                },
            ),
        },
    ),
    "phi4_multimodal": Family(
        "Phi4MultimodalConfig",
        {
            **BASE,
            "vision_config": {
                **SEES,
                "image_size": 28,
                "patch_size": 14,
                "crop_size": 28,
                "image_token_id": 290,
            },
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "nemo_conv_channels": 32,
                "audio_token_id": 291,
            },
        },
        "Phi4MultimodalForCausalLM",
        kind="wrapper",
    ),
}


def has_experts(name: str) -> bool:
    """Whether the family is a mixture, as its configuration says."""
    family = FAMILIES[name]
    inside = [sizes for _, sizes in (family.parts or {}).values()]
    return any(
        "num_experts" in key or "routed" in key or "local_experts" in key
        for sizes in (family.sizes, *inside)
        for key in sizes
    )


def build(name: str, folder: Path) -> Path:
    """Write a random model of the family and a tokenizer into ``folder``; the same weights every time."""
    import torch
    import transformers

    family, tokenizer = FAMILIES[name], tiny_tokenizer()
    parts = {key: getattr(transformers, kind)(**sizes) for key, (kind, sizes) in (family.parts or {}).items()}
    ends = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = getattr(transformers, family.config)(**family.sizes, **parts, **ends)
    for each in {id(one): one for one in (config, config.get_text_config())}.values():
        vars(each).update(ends)
    make: Callable[[Any], Any] = (
        getattr(transformers, family.model) if family.model else transformers.AutoModelForCausalLM.from_config
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config)
        for weight in model.parameters():  # logits of weights this large are something an adapter can steer
            if weight.dim() >= 2 or not weight.any():
                weight.data.normal_(0.0, 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rewrite(folder: Path, **changes: Any) -> Path:
    """Change a model's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}), encoding="utf-8")
    return folder
