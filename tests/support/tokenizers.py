"""Tokenizers built on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WORDS = "Name a colour. Red. Blue. Who keeps the key? The baker. One? Two? Answer: is four Question: \n"


def bytes_tokenizer(specials: Sequence[str], template: str | None, **names: str) -> Any:
    """A token for each byte of UTF-8 and for each of ``specials``; ``names``: ``eos_token`` and so on."""
    return _byte_level([], specials, template, names)


def merging_tokenizer(specials: Sequence[str], template: str | None, **names: str) -> Any:
    """The same with merges, which also join a space with the word behind it."""
    return _byte_level([WORDS] * 3, specials, template, names)


def sentencepiece_tokenizer(specials: Sequence[str], template: str | None, **names: str) -> Any:
    """Writes a space as U+2581 and puts one in front of a text, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    octets = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *octets], show_progress=False)
    backend.train_from_iterator([WORDS] * 3, trainer)
    return _wrapped(backend, specials, template, names)


def _byte_level(corpus: list[str], specials: Sequence[str], template: str | None, names: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if corpus:
        trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(corpus, trainer)
    return _wrapped(backend, specials, template, names)


def _wrapped(backend: Any, specials: Sequence[str], template: str | None, names: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens(list(specials))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer
