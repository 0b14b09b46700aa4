"""A byte-level BPE tokenizer as llama.cpp reads it from a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import ModelError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES: Mapping[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (LLAMA3,): "llama-bpe",
    (LLAMA3.replace("{1,3}", ""),): "qwen2",
}
"""llama.cpp's name of how a text is cut before it is merged, by the steps of tokenizer.json that do so."""
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Marks in a chat template of what the assistant writes: llama.cpp does not know them."""
ANOTHER = (
    "Make --merged and convert that with llama.cpp's convert_hf_to_gguf.py, which knows more tokenizers."
)


def add_tokenizer(writer: Any, tokenizer: Any, rows: int, stops: list[int]) -> None:
    """Write the tokens, merges, ends and the chat template; ``rows``: of the embeddings.

    Raises:
        ModelError: llama.cpp's name for such a tokenizer is not known here.
    """
    import gguf

    content = _content(tokenizer)
    added = {one["id"]: one for one in content.get("added_tokens", ())}
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for number in range(rows):
        tokens.append(words.get(number, f"[PAD{number}]"))
        if number not in words:
            kinds.append(gguf.TokenType.UNUSED)
        elif number in added:
            special = added[number]["special"]
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    merges = [one if isinstance(one, str) else " ".join(one) for one in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule_of(content))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or [f"{tokens[0]} {tokens[0]}"])
    _add_ends(writer, tokenizer, stops)
    if template := tokenizer.chat_template:
        writer.add_chat_template(GENERATION.sub("", str(template)))


def begins(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a beginning in front of a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def rule_of(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json cuts a text.

    Raises:
        ModelError: there is none that is known here.
    """
    model = content["model"]
    if model.get("type") != "BPE" or not _is_byte_level(content):
        raise ModelError(f"Its tokenizer ({model.get('type')}) is no byte-level BPE. {ANOTHER}")
    steps = _steps(content.get("pre_tokenizer"))
    if not model["merges"]:
        return "gpt-2"  # nothing is merged, so nothing need be cut
    if content.get("normalizer") or steps not in RULES:
        shown = ", ".join(step[:60] for step in steps) or "nothing"
        raise ModelError(
            f"llama.cpp's name for how its tokenizer cuts texts ({shown}) is not known here. {ANOTHER}"
        )
    return RULES[steps]


def _content(tokenizer: Any) -> Mapping[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"Its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json. {ANOTHER}")
    found: Mapping[str, Any] = read_json(backend.to_str())
    return found


def _steps(rule: Any) -> tuple[str, ...]:
    """What a pre-tokenizer does, flat: names of steps, and patterns; a ByteLevel without its own is none."""
    if not rule:
        return ()
    if rule["type"] == "Sequence":
        return tuple(step for one in rule["pretokenizers"] for step in _steps(one))
    if rule["type"] == "Split":
        return (str(rule["pattern"].get("Regex") or rule["pattern"].get("String")),)
    if rule["type"] == "ByteLevel" and not rule.get("use_regex", True):
        return ()
    if rule["type"] == "Digits" and not rule.get("individual_digits"):
        return ("Digits together",)
    return (str(rule["type"]),)


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])


def _add_ends(writer: Any, tokenizer: Any, stops: list[int]) -> None:
    """The trained end of turn is where llama.cpp stops as well."""
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(begins(tokenizer))
    end = stops[0] if stops else tokenizer.eos_token_id
    if end is not None:
        writer.add_eos_token_id(end)
        writer.add_eot_token_id(end)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
