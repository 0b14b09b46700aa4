"""A base model of a few thousand weights, built on the spot: for tests and dry runs, no download.

Its tokenizer is a byte-level BPE without merges, so every text has one token per UTF-8 byte and
token counts can be worked out by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TURN_START, TURN_END, PAD = "<|im_start|>", "<|im_end|>", "<pad>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_model(
    folder: Path,
    *,
    vocab: int = 300,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
    chat_template: bool = True,
    merges: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write a Llama of ``layers`` random layers and its tokenizer into ``folder``.

    The folder holds config.json, model.safetensors and the tokenizer files; the same arguments
    give the same weights. Returns ``folder``.

    Raises:
        ValueError: ``vocab`` is below the 259 ids of the bytes and the special tokens, or
            ``hidden`` is not a multiple of 8.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if vocab < 259 or hidden % 8:
        raise ValueError(f"vocab >= 259 and hidden % 8 == 0 are needed, not {vocab} and {hidden}")
    tokenizer = tiny_tokenizer(chat_template, merges)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 8,
        num_key_value_heads=hidden // 8,
        max_position_embeddings=2048,
        initializer_range=0.2,  # logits of random weights this large are something an adapter can steer
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # A private random-number state: building a model must not shift the caller's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer(chat_template: bool = True, merges: Sequence[tuple[str, str]] = ()) -> Any:
    """The byte-level tokenizer of the tiny models; ``merges``: pairs that are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([TURN_START, TURN_END, PAD])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat_template else None
    return tokenizer
