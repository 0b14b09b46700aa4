"""Rows as tokens: made once, kept in the cache, read by every worker without a tokenizer.

A row is prompt ids followed by completion ids, each tokenized on its own, so the prompt is an exact
prefix of the row and generation starts from the very ids that training saw.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import DataError, SettingsError, UntrustedCode
from budgetsearch.core.ports import Say
from budgetsearch.storage.files import fresh_folder, locked, sha256_of
from budgetsearch.training.data.examples import Example, load_examples, prompt_key, split
from budgetsearch.training.data.limit import Limit
from budgetsearch.training.data.store import TokenSet, writing
from budgetsearch.training.data.trust import FLAG, code_files, uses_code
from budgetsearch.training.quiet import quiet

FORMAT = 2
"""Raised whenever the same rows would give other tokens: old caches are then left alone."""
MIN_LENGTH = 8
TOKENIZER_FILES = ("*token*", "chat_template*", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
# Fixed values for what some chat templates fill in by themselves: today's date, a thinking block.
TEMPLATE_VALUES: Mapping[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}
PLAIN_HEADS = {"system": "### Context", "user": "### Instruction", "assistant": "### Response"}
TEMPLATE_LIMIT = Limit(10.0)
"""Seconds in which a chat template renders a row; a loop in a loop would go on for ever."""
PROBE = "budgetsearch probe"


@dataclass(frozen=True)
class TokenStats:
    """What a split holds; all counts are of the rows that were kept, ``dropped`` aside."""

    rows: int
    tokens: int
    target_tokens: int
    """Completion tokens: those with a loss."""
    truncated: int
    dropped: int
    """Rows without a single completion token."""
    max_row_tokens: int
    mean_row_tokens: float


@dataclass(frozen=True)
class PreparedData:
    """A training and a validation set in the cache; the folder's name is a hash of all that made them."""

    folder: Path
    train: TokenSet
    valid: TokenSet
    train_stats: TokenStats
    valid_stats: TokenStats
    template: str
    """``chat`` (the tokenizer's own) or ``plain``."""
    source_sha256: str
    """Hash of the rows, before any split."""
    valid_examples: list[Example]
    """The rows of ``valid``, in its order."""

    def valid_hashes(self) -> dict[str, str]:
        """What tells whether two runs have the same validation rows, as text and as tokens."""
        tokens = sha256_of(self.folder / "valid.safetensors")
        rows = _sha256(_as_json(dataclasses.replace(e, place="")) for e in self.valid_examples)
        return {"valid_rows_sha256": rows, "valid_tokens_sha256": tokens}


@dataclass(frozen=True)
class Sources:
    """Where the rows come from, and which of them are held out."""

    data: str
    valid: str | None = None
    """None: a seeded ``valid_share`` of ``data``."""
    seed: int = 0
    max_rows: int | None = None
    """A seeded sample of so many rows of ``data``."""
    valid_share: float = 0.1


def prepare(
    model_path: Path,
    sources: Sources,
    *,
    max_length: int,
    cache: Path,
    trust_remote_code: bool = False,
    say: Say = lambda _: None,
) -> PreparedData:
    """Read, split and tokenize, or find the outcome in the cache.

    ``max_length`` is in tokens.

    Raises:
        DataError: a source or a row cannot be used, or nothing is left.
        SettingsError: ``max_length`` is too small to hold a row.
    """
    if max_length < MIN_LENGTH:
        raise SettingsError(f"max_length is {max_length}; it must be {MIN_LENGTH} tokens at least")
    train, held_out = _split_sources(sources, say)
    # Sorted and without their places: neither the shuffle nor a file's name changes what the rows are.
    source = _sha256(sorted(_as_json(dataclasses.replace(e, place="")) for e in [*train, *held_out]))
    ordered = _sha256(_as_json(example) for example in [*train, *held_out])
    tokenizer = _tokenizer_hash(model_path, code=trust_remote_code)
    facts = (FORMAT, ordered, len(train), tokenizer, max_length, sources.seed)
    folder = cache / "data" / _sha256(map(str, facts))[:32]
    with locked(cache / "locks" / folder.name):
        if not folder.exists():
            say(f"tokenizing {len(train)} training and {len(held_out)} validation rows")
            loaded = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
            _write(folder, loaded, train, held_out, max_length, source)
    return open_prepared(folder)


def open_prepared(folder: Path) -> PreparedData:
    """Read what ``prepare`` wrote; needs no tokenizer.

    Raises:
        DataError: the folder is missing or damaged.
    """
    from safetensors import SafetensorError

    try:
        meta = read_json((folder / "meta.json").read_text(encoding="utf-8"))
        lines = (folder / "valid.jsonl").read_text(encoding="utf-8").split("\n")
        return PreparedData(
            folder=folder,
            train=TokenSet(folder / "train.safetensors"),
            valid=TokenSet(folder / "valid.safetensors"),
            train_stats=TokenStats(**meta["train"]),
            valid_stats=TokenStats(**meta["valid"]),
            template=meta["template"],
            source_sha256=meta["source_sha256"],
            valid_examples=[_from_json(line) for line in lines if line],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"prepared data in {folder} cannot be read ({error}); delete that folder") from error


def load_tokenizer(model_path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a base model's folder, with a pad token.

    Raises:
        UntrustedCode: it runs its own code to load, and that is not allowed.
        DataError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            # Said, not left out: else transformers asks on the terminal, and a worker has none.
            tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if uses_code(model_path) and not trust_remote_code and "trust_remote_code" in str(error):
            raise UntrustedCode(
                f"the tokenizer in {model_path} runs its own Python code to load; read that code, then allow "
                f"it with {FLAG} (trust_remote_code)"
            ) from error
        raise DataError(f"the tokenizer in {model_path} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# ----------------------------------------------------------------------- templates


def render_prompt(tokenizer: Any, example: Example) -> str:
    """The text that a completion follows. Tokenize it with ``add_special_tokens=False``.

    Raises:
        DataError: the chat template does not take these messages.
    """
    if not tokenizer.chat_template:
        begin = tokenizer.bos_token if _begins(tokenizer) else ""
        turns = [f"{_head(message)}\n{message['content']}\n\n" for message in example.prompt]
        return begin + "".join(turns) + f"{PLAIN_HEADS['assistant']}\n"
    return _render(tokenizer, example.prompt, example.place, add_generation_prompt=True)


def _head(message: Mapping[str, str]) -> str:
    return PLAIN_HEADS.get(message["role"], f"### {message['role'].title()}")


def _begins(tokenizer: Any) -> bool:
    """Whether this tokenizer begins every text with its bos token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], place: str, **options: Any) -> str:
    chat = [dict(message) for message in messages]
    try:
        return TEMPLATE_LIMIT.call(
            lambda: str(tokenizer.apply_chat_template(chat, tokenize=False, **TEMPLATE_VALUES, **options))
        )
    except Exception as error:  # a template is a stranger's program: it may divide by zero or call itself
        raise DataError(
            f"{place}: the model's chat template does not take these messages: {error!r}"
        ) from error


def _around(tokenizer: Any) -> tuple[str, str]:
    """What the template puts before and after a completion; the end of turn is always there."""
    eos = tokenizer.eos_token or ""
    if not tokenizer.chat_template:
        return "", eos
    ask = {"role": "user", "content": "?"}
    prompt = _render(tokenizer, [ask], "probe", add_generation_prompt=True)
    whole = _render(tokenizer, [ask, {"role": "assistant", "content": PROBE}], "probe")
    if not whole.startswith(prompt) or PROBE not in whole[len(prompt) :]:
        return "", eos
    before, after = whole[len(prompt) :].split(PROBE, 1)
    # What follows the end of turn belongs to the next one: the model stops before it.
    after = after.rstrip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    ends = bool(ids) and ids[-1] in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return before, after if ends else after + eos


# --------------------------------------------------------------------- tokenization


def _tokenize(
    tokenizer: Any, examples: Sequence[Example], max_length: int
) -> tuple[list[tuple[list[int], int]], list[Example], TokenStats]:
    """Rows as (ids, prompt length), the examples they come from, and what was cut."""
    before, after = _around(tokenizer)
    prompts = _ids(tokenizer, [render_prompt(tokenizer, example) for example in examples])
    texts = [before + example.completion.strip() + after for example in examples]
    rows, kept, truncated = [], [], 0
    for example, prompt, completion in zip(examples, prompts, _ids(tokenizer, texts), strict=True):
        cut_prompt, cut_completion = fit(prompt, completion, max_length)
        if not cut_prompt or not cut_completion:
            continue
        truncated += len(cut_prompt) + len(cut_completion) < len(prompt) + len(completion)
        rows.append((cut_prompt + cut_completion, len(cut_prompt)))
        kept.append(example)
    return rows, kept, _stats(rows, truncated, len(examples) - len(rows))


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    with quiet():  # a row above the model's length is cut later, no need to warn
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def fit(prompt: list[int], completion: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Cut a row to ``max_length`` tokens.

    A prompt that leaves a quarter of the room keeps everything and the completion's end goes, the end
    of turn with it: the model must not learn to stop there. A longer prompt loses its beginning, and
    keeps a quarter of the room where the completion is long as well.
    """
    quarter = max_length // 4
    if len(prompt) + len(completion) <= max_length:
        return prompt, completion
    if len(prompt) <= max_length - quarter:
        return prompt, completion[: max_length - len(prompt)]
    completion = completion[: max_length - quarter]
    return prompt[len(prompt) - (max_length - len(completion)) :], completion


def _stats(rows: Sequence[tuple[list[int], int]], truncated: int, dropped: int) -> TokenStats:
    lengths = [len(ids) for ids, _ in rows]
    tokens = sum(lengths)
    return TokenStats(
        rows=len(rows),
        tokens=tokens,
        target_tokens=tokens - sum(prompt for _, prompt in rows),
        truncated=truncated,
        dropped=dropped,
        max_row_tokens=max(lengths, default=0),
        mean_row_tokens=tokens / max(1, len(rows)),
    )


# -------------------------------------------------------------------------- writing


def _write(
    folder: Path, tokenizer: Any, train: list[Example], valid: list[Example], max_length: int, source: str
) -> None:
    meta: dict[str, Any] = {
        "source_sha256": source,
        "template": "chat" if tokenizer.chat_template else "plain",
    }
    with fresh_folder(folder) as fresh:
        for name, examples in (("train", train), ("valid", valid)):
            rows, kept, stats = _tokenize(tokenizer, examples, max_length)
            if not rows:
                raise DataError(f"no {name} row is left: every completion was empty after tokenization")
            with writing(fresh / f"{name}.safetensors") as writer:
                for ids, prompt in rows:
                    writer.add(ids, [False] * prompt + [True] * (len(ids) - prompt))
            meta[name] = dataclasses.asdict(stats)
            if name == "valid":
                lines = [_as_json(example) + "\n" for example in kept]
                (fresh / "valid.jsonl").write_text("".join(lines), encoding="utf-8")
        (fresh / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _split_sources(sources: Sources, say: Say) -> tuple[list[Example], list[Example]]:
    data, valid, seed, max_rows = sources.data, sources.valid, sources.seed, sources.max_rows
    rows = load_examples(data, say)
    if max_rows is not None and max_rows < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), max_rows))]
    if valid is None:
        return split(rows, seed, sources.valid_share)
    held_out = load_examples(valid, say)
    # Every trial is evaluated on the first rows: shuffled, those are a sample of all.
    random.Random(seed).shuffle(held_out)
    seen = {prompt_key(example) for example in held_out}
    train = [example for example in rows if prompt_key(example) not in seen]
    if not train:
        raise DataError(f"every prompt of {data} is in {valid} too; nothing is left to train on")
    if len(train) < len(rows):
        say(f"{len(rows) - len(train)} rows of {data} are left out: their prompts are in {valid} too")
    return train, held_out


def _as_json(example: Example) -> str:
    return json.dumps(dataclasses.asdict(example), ensure_ascii=False, sort_keys=True)


def _from_json(line: str) -> Example:
    value = read_json(line)
    return Example(tuple(value["prompt"]), value["completion"], value["check"], value["place"])


def _sha256(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8") + b"\n")
    return digest.hexdigest()


def _tokenizer_hash(model_path: Path, *, code: bool) -> str:
    files = {file for pattern in TOKENIZER_FILES for file in model_path.glob(pattern) if file.is_file()}
    files.update(code_files(model_path) if code else ())
    return _sha256(f"{f.name} {sha256_of(f)}" for f in sorted(files))
