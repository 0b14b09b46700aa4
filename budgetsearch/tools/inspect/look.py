"""Prepare the data as a run does, and look at what came of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from budgetsearch.core.ports import Say
from budgetsearch.run.configuration import check_one_model
from budgetsearch.run.preflight import anchored, resolve
from budgetsearch.run.prepare import prepare_inputs
from budgetsearch.run.settings import Settings
from budgetsearch.training.data.store import TokenSet
from budgetsearch.training.data.tokenizer import load_tokenizer
from budgetsearch.training.data.tokens import PreparedData

LOOKED_AT = 1000
"""Rows of each set that warnings rest on."""
MANY = 0.1
"""A share of the rows that is worth a word."""
FEW_TRAINED = 0.02
"""A share of trained tokens that is worth one."""


@dataclass(frozen=True)
class Piece:
    """Tokens side by side that are all trained, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Row:
    """A row as the model will see it."""

    part: str
    """``train`` or ``valid``."""
    place: str
    ids: list[int]
    trained: list[int]
    """1 for each token to learn."""
    pieces: list[Piece]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        text = "".join(piece.text for piece in self.pieces)
        return {"set": self.part, "place": self.place, "ids": self.ids, "trained": self.trained, "text": text}


@dataclass(frozen=True)
class Inspection:
    """What will be trained, and what will not."""

    rows: list[Row]
    counts: dict[str, Any]
    lines: list[str]
    """The counts in words."""
    warnings: list[str]
    stop_tokens: list[str]
    """What ends an answer, when the model is asked."""
    lengths: list[tuple[int, int, int]]
    """(from, to, rows): how long the rows are, in tokens."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "counts": self.counts,
            "warnings": self.warnings,
            "stop_tokens": self.stop_tokens,
            "lengths": [{"from": a, "to": b, "rows": count} for a, b, count in self.lengths],
        }


def look(settings: Settings, say: Say, rows: int | None) -> Inspection:
    """Prepare the data of these settings, which a run then finds in the cache, and show so many rows of it.

    ``rows``: None for all.

    Raises:
        UsageError: the model or the data cannot be used.
    """
    check_one_model(settings)
    space = resolve(settings).space
    base, data = prepare_inputs(anchored(settings), say, space=space)
    tokenizer = load_tokenizer(base.path, trust_remote_code=settings.trust_remote_code)
    shown = itertools.islice(_rows(data, tokenizer), rows)
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(data.facts["stops"])]
    return Inspection(
        rows=list(shown),
        counts=_counts(data),
        lines=data.lines(),
        warnings=list(_warnings(data, tokenizer)),
        stop_tokens=stops,
        lengths=_histogram(numpy.concatenate([data.train.lengths, data.valid.lengths])),
    )


def _counts(data: PreparedData) -> dict[str, Any]:
    facts = data.facts
    skipped = {
        reason: {"rows": count, "places": places} for reason, (count, places) in facts["skipped"].items()
    }
    return {
        "rows": facts["rows"],
        "train": data.train_stats.rows,
        "valid": data.valid_stats.rows,
        "kept": data.train_stats.rows + data.valid_stats.rows,
        "skipped": skipped,
        "kept_out": facts["kept_out"],
        "duplicates": facts["duplicates"],
        "cut": facts["cut"],
        "notes": facts["notes"],
        "tokens": data.train_stats.tokens + data.valid_stats.tokens,
        "trained_tokens": data.train_stats.target_tokens + data.valid_stats.target_tokens,
    }


def _rows(data: PreparedData, tokenizer: Any) -> Iterator[Row]:
    for part, some in (("train", data.train), ("valid", data.valid)):
        for index, place in enumerate(data.places(part)):
            ids, trained = some.row(index)
            pieces = list(_pieces(tokenizer, ids.tolist(), trained.tolist()))
            yield Row(part, place, ids.tolist(), [int(one) for one in trained], pieces)


def _pieces(tokenizer: Any, ids: list[int], trained: list[bool]) -> Iterator[Piece]:
    start = 0
    for flag, some in itertools.groupby(trained):
        end = start + len(list(some))
        # What came before decides on spaces, so a piece is what it adds.
        before = _decoded(tokenizer, ids[:start])
        whole = _decoded(tokenizer, ids[:end])
        text = whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, ids[start:end])
        yield Piece(text, flag)
        start = end


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""


def _histogram(lengths: Any) -> list[tuple[int, int, int]]:
    """Rows by length, each bin twice as wide as the one before."""
    bins: list[tuple[int, int, int]] = []
    start = 1
    while start <= int(lengths.max()):
        inside = int(((lengths >= start) & (lengths < 2 * start)).sum())
        if bins or inside:
            bins.append((start, 2 * start - 1, inside))
        start *= 2
    return bins


# ----------------------------------------------------------------------------- the warnings


def _warnings(data: PreparedData, tokenizer: Any) -> Iterator[str]:
    """What a look at the rows finds wrong, each with what it means."""
    facts, kept = data.facts, data.train_stats.rows + data.valid_stats.rows
    yield from (f"{note}: {count} rows" for note, count in facts["notes"].items())
    if facts["cut"] > MANY * kept:
        yield f"{facts['cut']} of {kept} rows are cut; a larger --max-length would keep them whole"
    if facts["duplicates"] > MANY * facts["rows"]:
        yield f"{facts['duplicates']} of {facts['rows']} rows are there twice or more"
    trained = data.train_stats.target_tokens / max(1, data.train_stats.tokens)
    if trained < FEW_TRAINED:
        yield f"only {trained:.1%} of the tokens are trained; the answers are short beside their prompts"
    if data.template == "plain":
        yield "the model has no chat template: rows are written with heads such as ### Instruction"
    yield from _about_ends(data.train, facts)
    yield from _about_begins(data.train, tokenizer)


def _about_ends(rows: TokenSet, facts: Mapping[str, Any]) -> Iterator[str]:
    """Whether answers end with what ends an answer when the model is asked."""
    last = [ids[numpy.flatnonzero(trained)[-1]] for ids, trained in _first(rows)]
    without = sum(int(token) not in facts["stops"] for token in last)
    if without > facts["cut"]:
        yield (
            f"{without} of {len(last)} rows do not end with a token that ends an answer, so the model may "
            "not learn to stop; look at the chat template"
        )


def _about_begins(rows: TokenSet, tokenizer: Any) -> Iterator[str]:
    """Whether rows begin once with the token that texts begin with."""
    begin = tokenizer.bos_token_id
    if begin is None:
        return
    first = [ids[:2].tolist() for ids, _ in _first(rows)]
    if doubled := sum(ids == [begin, begin] for ids in first):
        yield f"{doubled} rows begin with {tokenizer.bos_token} twice; look at the chat template"
    wanted = tokenizer("a")["input_ids"][:1] == [begin]
    if wanted and (missing := sum(ids[:1] != [begin] for ids in first)):
        yield (
            f"{missing} rows do not begin with {tokenizer.bos_token}, with which the tokenizer begins every "
            "text; the chat template leaves it out"
        )


def _first(rows: TokenSet) -> Iterator[tuple[Any, Any]]:
    return (rows.row(index) for index in range(min(LOOKED_AT, len(rows))))
