"""Rows as tokens: made once, kept in the cache, read by every worker without a tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import DataError, SettingsError
from budgetsearch.core.ports import Say
from budgetsearch.storage.files import fresh_folder, locked, sha256_of
from budgetsearch.training.data.conversation import Sample, target_bytes
from budgetsearch.training.data.origins import origins_of
from budgetsearch.training.data.preparer import PROMPTS, Task, described
from budgetsearch.training.data.samples import Source, find, sample_in
from budgetsearch.training.data.scan import TRAIN, VALID
from budgetsearch.training.data.store import Chosen, Cut, TokenSet
from budgetsearch.training.data.supervise import prepare_apart
from budgetsearch.training.data.tally import Tally, most_of
from budgetsearch.training.data.templates import Options
from budgetsearch.training.data.tokenizer import tokenizer_hash

FORMAT = 7
"""Raised whenever the same rows would give other tokens: old caches are then left alone."""
MIN_LENGTH = 8
KEPT = ("train.safetensors", "valid.safetensors", "train.places", "valid.places", "valid.samples", PROMPTS)
"""What of the work stays, beside ``meta.json``."""


@dataclass(frozen=True)
class TokenStats:
    """What a split holds."""

    rows: int
    tokens: int
    target_tokens: int
    """Trained tokens: those with a loss."""
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
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else was found: rows, skipped, kept_out, duplicates, cut, notes, stops, lead."""

    kept: frozenset[str] | None = None
    """Places of the validation rows that count; None: all do."""
    _cuts: dict[int, TokenSet] = field(default_factory=dict, repr=False, compare=False)

    def train_to(self, longest: int) -> TokenSet:
        """The training rows, cut to ``longest`` tokens."""
        if longest >= self.train_stats.max_row_tokens:
            return self.train
        if longest not in self._cuts:
            self._cuts[longest] = Cut(self.train, longest)
        return self._cuts[longest]

    def samples(self) -> Iterator[Sample]:
        """The samples that the rows of ``valid`` come from, in their order."""
        yield from (one for one in self._samples() if self._counts(one))

    def _counts(self, sample: Sample) -> bool:
        return self.kept is None or _plain(sample) in self.kept

    def _samples(self) -> Iterator[Sample]:
        with (self.folder / "valid.samples").open("rb") as lines:
            yield from map(sample_in, lines)

    def questions(self) -> Iterator[tuple[Sample, list[int]]]:
        """The first validation samples whose last answer can be asked for and compared, with the ids to ask
        with; as many as a run asks at most."""
        with (self.folder / PROMPTS).open(encoding="utf-8") as lines:
            for sample, line in zip(self._samples(), lines, strict=False):
                if (ids := read_json(line)) is not None and self._counts(sample):
                    yield sample, ids

    def places(self, part: str) -> Iterator[str]:
        """Where each row of ``train`` or ``valid`` stands in its source, in their order."""
        with (self.folder / f"{part}.places").open(encoding="utf-8") as lines:
            yield from (line.removesuffix("\n") for line in lines)

    def valid_hashes(self) -> dict[str, str]:
        """What tells whether two runs have the same validation rows, as text and as tokens."""
        tokens = sha256_of(self.folder / "valid.safetensors")
        return {"valid_rows_sha256": str(self.facts["valid_rows_sha256"]), "valid_tokens_sha256": tokens}

    def whole_rows(self, max_length: int) -> dict[str, int]:
        """The validation rows that are all of their sample, by its place: neither split nor cut, and with a
        completion. Their indices, in their order."""
        places = list(self.places("valid"))
        counts, says = Counter(places), {_plain(one): self._bytes(one) for one in self.samples()}
        return {
            place: row
            for row, place in enumerate(places)
            if counts[place] == 1 and self.valid.lengths[row] < max_length and says.get(place)
        }

    def without(self, left_out: Collection[int]) -> PreparedData:
        """The same without some validation rows; those that stay are all of their samples."""
        gone = set(left_out)
        kept = [row for row in range(len(self.valid)) if row not in gone]
        places = list(self.places("valid"))
        mine = frozenset(places[row] for row in kept)
        return dataclasses.replace(self, valid=Chosen(self.valid, kept), kept=mine)

    def valid_bytes(self) -> tuple[int, ...]:
        """Bytes of what each validation row teaches, where every row is all of its sample."""
        return tuple(map(self._bytes, self.samples()))

    def _bytes(self, sample: Sample) -> int:
        options = self.facts["options"]
        return target_bytes(sample, last=options["train_on"] == "last", thoughts=options["thinking"] != "off")

    def lines(self) -> list[str]:
        """What became of the rows, in five lines at most."""
        return summary(self.facts, self.train_stats.rows, self.valid_stats.rows)


def _plain(sample: Sample) -> str:
    """Its place, as ``places`` has it."""
    return sample.place.replace("\n", " ").encode("utf-8", "replace").decode()


def summary(facts: Mapping[str, Any], train: int, valid: int) -> list[str]:
    """What became of the rows, in five lines at most."""
    tally = Tally()
    tally.merge(facts["skipped"])
    lines = [f"{facts['rows']} rows: {train} are trained on, {valid} are for validation"]
    if facts["duplicates"]:
        lines[0] += f"; {facts['duplicates']} are there twice or more"
    if tally.total:
        lines.append(f"{tally.total} of {facts['rows']} rows are skipped: {tally}")
    if facts["kept_out"]:
        lines.append(f"{facts['kept_out']} rows are left out: their prompts are validation rows too")
    if facts["cut"]:
        lines.append(f"{facts['cut']} rows are longer than {facts['max_length']} tokens and are cut")
    if facts["notes"]:
        lines.append("; ".join(f"{note}: {count} rows" for note, count in facts["notes"].items()))
    return lines


@dataclass(frozen=True)
class Sources:
    """Where the rows come from, and which of them are held out."""

    data: str
    """One source a line."""
    valid: str | None = None
    """None: what ``data`` set apart themselves, else a seeded ``valid_share`` of them."""
    seed: int = 0
    max_rows: int | None = None
    """A seeded sample of so many rows of ``data``."""
    valid_share: float = 0.1
    columns: str | None = None
    bad_rows: str | None = None
    """So many rows may be skipped: a number, or a share such as 1%."""

    def find(self, say: Say) -> tuple[list[Source], list[Source]]:
        """The sources to train on and those for validation, on this machine.

        Raises:
            DataError: one is not there, or cannot be reached.
        """
        train = find(origins_of(self.data, self.columns), say)
        if self.valid is not None:
            columns = self.columns if "\n" not in (self.columns or "") else None
            return train, find(origins_of(self.valid, columns), say)
        apart = [
            Source(dataclasses.replace(one.origin, weight=None), held_out)
            for one in train
            if (held_out := one.located.held_out()) is not None
        ]
        for one in apart:
            say(f"the validation rows are those that {one.located.source} sets apart")
        return train, apart


def prepare(
    model_path: Path,
    sources: Sources,
    *,
    max_length: int,
    cache: Path,
    options: Options | None = None,
    trust_remote_code: bool = False,
    say: Say = lambda _: None,
    seconds_left: Callable[[], float] | None = None,
) -> PreparedData:
    """Read, split and tokenize in a process of its own, or find the outcome in the cache.

    ``max_length`` is in tokens. ``seconds_left``: until it must be done; None: no limit.

    Raises:
        DataError: a source or its rows cannot be used, or nothing is left.
        SettingsError: ``max_length`` is too small to hold a row.
    """
    if max_length < MIN_LENGTH:
        raise SettingsError(f"max_length is {max_length}; it must be {MIN_LENGTH} tokens at least")
    most_of(sources.bad_rows, 1)
    train, valid = sources.find(say)
    task = Task(
        model_path=str(model_path),
        folder="",
        sources=[*(described(one, TRAIN) for one in train), *(described(one, VALID) for one in valid)],
        max_length=max_length,
        seed=sources.seed,
        options=dataclasses.asdict(options or Options()),
        max_rows=sources.max_rows,
        valid_share=sources.valid_share,
        bad_rows=sources.bad_rows,
        trust_remote_code=trust_remote_code,
        cores=len(os.sched_getaffinity(0)),
    )
    folder = cache / "data" / _name_of(task, [*train, *valid])
    with locked(cache / "locks" / folder.name):
        if not folder.exists():
            return _made(task, folder, say, seconds_left)
    data = open_prepared(folder)
    for line in data.lines():
        say(line)
    return data


def _made(task: Task, folder: Path, say: Say, seconds_left: Callable[[], float] | None) -> PreparedData:
    """Prepare into a folder that does not exist yet; what is said is said before it does."""
    with fresh_folder(folder) as fresh:
        facts = prepare_apart(dataclasses.replace(task, folder=str(fresh)), say, seconds_left)
        facts |= {"max_length": task.max_length, "options": task.options}
        for line in summary(facts, facts["train"]["rows"], facts["valid"]["rows"]):
            say(line)
        for file in fresh.iterdir():
            if file.name not in KEPT:
                file.unlink()
        (fresh / "meta.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return open_prepared(folder)


def _name_of(task: Task, sources: Sequence[Source]) -> str:
    """A hash of all that decides on the tokens: the bytes of the files, not where they lie."""
    files = [
        [[name, sha256_of(file)] for name, file in one.located.names().items()] or one.located.source
        for one in sources
    ]
    described = [
        [one["role"], one["origin"]["weight"], one["origin"]["columns"], one["cut"]] for one in task.sources
    ]
    facts = (
        *(
            FORMAT,
            files,
            described,
            task.max_length,
            task.seed,
            task.max_rows,
            task.valid_share,
            task.options,
        ),
        *(task.bad_rows, tokenizer_hash(Path(task.model_path), code=task.trust_remote_code)),
    )
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def open_prepared(folder: Path) -> PreparedData:
    """Read what ``prepare`` wrote; needs no tokenizer.

    Raises:
        DataError: the folder is missing or damaged.
    """
    from safetensors import SafetensorError

    try:
        meta = read_json((folder / "meta.json").read_text(encoding="utf-8"))
        found = PreparedData(
            folder=folder,
            train=TokenSet(folder / "train.safetensors"),
            valid=TokenSet(folder / "valid.safetensors"),
            train_stats=TokenStats(**meta.pop("train")),
            valid_stats=TokenStats(**meta.pop("valid")),
            template=meta.pop("template"),
            source_sha256=meta.pop("source_sha256"),
            facts=meta,
        )
        next(found._samples())
        next(found.questions(), None)
        return found
    except (OSError, ValueError, KeyError, TypeError, StopIteration, SafetensorError) as error:
        raise DataError(f"prepared data in {folder} cannot be read ({error}); delete that folder") from error
