"""The process that makes tokens of rows: chat templates and tokenizers are strangers' programs.

It is told what to do by one line of JSON on its input, ends when that input does, and says on its output, in
lines of JSON, what it has to say. What it works at is in a small file that whoever started it looks at, for
a program that hangs says nothing more.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import DataError, UsageError
from budgetsearch.core.policy.jobs import MAX_ANSWERS
from budgetsearch.machine import child
from budgetsearch.training.data import scan
from budgetsearch.training.data.conversation import Skip
from budgetsearch.training.data.encoder import Encoder, check_vocabulary, prompt_of
from budgetsearch.training.data.origins import Cut, Located, Origin
from budgetsearch.training.data.samples import Source, sample_in
from budgetsearch.training.data.scan import LEFT, SAMPLES, TRAIN, VALID, Lines, Spool
from budgetsearch.training.data.store import TokenSet, TokenWriter, writing
from budgetsearch.training.data.tally import Tally
from budgetsearch.training.data.templates import Options
from budgetsearch.training.data.tokenizer import load_tokenizer

PROMPTS = "valid.prompts"
MODULE = "budgetsearch.training.data.preparer"
AT = "at"
"""The file of what is worked at."""
SLOTS = 65
"""Numbers in it: the row that is read, and a sample for each process."""
NOTHING, PROBE = -1, -2
"""Instead of a row: nothing that may hang, and the first look at the chat template."""
SHARED_ROWS = 20_000
"""From so many rows on several processes share the work: each begins with seconds of imports."""
MAX_VALID = 500
Tell = Callable[[Mapping[str, Any]], None]


class Marks:
    """What is worked at, for whoever looks from outside."""

    def __init__(self, folder: Path) -> None:
        path = folder / AT
        if not path.exists():
            path.write_bytes(struct.pack("<q", NOTHING) * SLOTS)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def set(self, slot: int, number: int) -> None:
        """Process ``slot`` (0: the one that reads) begins with this row."""
        struct.pack_into("<q", self._map, 8 * slot, number)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be prepared, as JSON values."""

    model_path: str
    folder: str
    """Where everything is written."""
    sources: list[dict[str, Any]]
    max_length: int
    seed: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_rows: int | None = None
    valid_share: float = 0.1
    bad_rows: str | None = None
    trust_remote_code: bool = False
    cores: int = 1
    share: tuple[int, int] | None = None
    """Of a process that only makes tokens: its number from 1 on, and of how many."""

    def found(self, role: int) -> list[Source]:
        """The sources of TRAIN or VALID."""
        return [_source(one) for one in self.sources if one["role"] == role]


def described(source: Source, role: int) -> dict[str, Any]:
    """A source as JSON values."""
    located, origin = source.located, source.origin
    return {
        "role": role,
        "origin": dataclasses.asdict(origin),
        "source": located.source,
        "files": [str(file.absolute()) for file in located.files],
        "folder": str(located.folder.absolute()),
        "cut": [located.cut.start, located.cut.stop],
    }


def _source(value: Mapping[str, Any]) -> Source:
    files = tuple(Path(file) for file in value["files"])
    located = Located(value["source"], files, Path(value["folder"]), cut=Cut(*value["cut"]))
    return Source(Origin(**value["origin"]), located)


# -------------------------------------------------------------------------------- the work


def work(task: Task, tell: Tell) -> dict[str, Any]:
    """Read, choose, make tokens, split and write ``train`` and ``valid``; returns what is worth knowing.

    Raises:
        UsageError: the rows or the model cannot be used.
    """
    folder, tally = Path(task.folder), Tally()
    marks = Marks(folder)
    sources = [*task.found(TRAIN), *task.found(VALID)]
    trains = len(task.found(TRAIN))
    spool = Spool(folder)
    spool.fill(sources, tally, lambda line: tell({"say": line}), lambda number: marks.set(0, number))
    marks.set(0, NOTHING)
    rows = len(spool) + tally.total
    if not rows:
        raise DataError(f"{sources[0].origin.source} holds no rows; give a file with rows")
    tally.check(rows, task.bad_rows)
    goes, kept_out = _goes(task, spool, trains)
    numpy.save(folder / "goes.npy", goes)
    numpy.save(folder / "starts.npy", numpy.frombuffer(spool.samples.starts, dtype=numpy.uint64))
    tell({"rows": rows, "samples": int(numpy.count_nonzero(goes != LEFT))})
    encoder = _encoder(task, lambda: marks.set(1, PROBE))
    found = _encoded(task, int(numpy.count_nonzero(goes != LEFT)), encoder)
    for part in found:
        tally.merge(part["tally"])
    tally.check(rows, task.bad_rows)
    written, valid = _written(task, spool, goes, found)
    _write_prompts(folder, encoder, zip(valid.tolist(), spool.samples.at(valid), strict=True), marks)
    return written | {
        "rows": rows,
        "skipped": tally.to_json(),
        "kept_out": kept_out,
        "duplicates": len(spool) - len(numpy.unique(numpy.frombuffer(spool.hashes, dtype=numpy.uint64))),
        "notes": dict(sum((Counter(part["notes"]) for part in found), Counter())),
        "template": "plain" if encoder.template.own else "chat",
        **encoder.facts(),
    }


def _goes(task: Task, spool: Spool, trains: int) -> tuple[Any, int]:
    """Where each sample goes, and how many are kept out because the validation rows ask the same."""
    sources = numpy.frombuffer(spool.sources, dtype=numpy.uint16).astype(numpy.int64)
    hashes = numpy.frombuffer(spool.hashes, dtype=numpy.uint64)
    keys = numpy.frombuffer(spool.keys, dtype=numpy.uint64)
    goes = numpy.full(len(spool), LEFT, dtype=numpy.uint8)
    goes[sources >= trains] = VALID
    train = numpy.flatnonzero(sources < trains)
    weights = [source.origin.weight for source in task.found(TRAIN)]
    if weights[0] is not None:
        train = scan.mixed(sources[train], [w or 0.0 for w in weights], hashes, task.seed)
    if task.max_rows is not None:
        train = scan.sampled(train, task.max_rows, hashes, task.seed)
    goes[train] = TRAIN
    held_back = numpy.isin(keys[train], keys[goes == VALID])
    goes[train[held_back]] = LEFT
    if held_back.any() and held_back.all():
        raise DataError(
            f"every prompt of {task.found(TRAIN)[0].origin.source} is in "
            f"{task.found(VALID)[0].origin.source} too; nothing is left to train on"
        )
    return goes, int(held_back.sum())


def _encoded(task: Task, samples: int, encoder: Encoder) -> list[dict[str, Any]]:
    """Tokens of all samples that are not LEFT, in several processes where that pays."""
    count = max(1, min(task.cores, SLOTS - 1, samples // SHARED_ROWS))
    others = [_start(dataclasses.replace(task, share=(number, count))) for number in range(2, count + 1)]
    found = [encode(dataclasses.replace(task, share=(1, count)), encoder)]
    for process in others:
        assert process.stdout is not None  # its input stays open: it ends with that
        found.append(_last_word(process.stdout.read()))
    return found


def _start(task: Task) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        child.python(MODULE), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, encoding="utf-8", env=child.environment(), cwd=child.NEUTRAL,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(dataclasses.asdict(task)) + "\n")
    process.stdin.flush()
    return process


def _last_word(output: str) -> dict[str, Any]:
    said: dict[str, Any] = read_json((output.splitlines() or ["{}"])[-1])
    if "done" not in said:
        raise DataError(said.get("error", "a process that makes tokens died"))
    done: dict[str, Any] = said["done"]
    return done


def _encoder(task: Task, look: Callable[[], None]) -> Encoder:
    """With ``look`` called before the chat template is given its first conversations.

    Raises:
        UsageError: the model cannot be used.
    """
    tokenizer = load_tokenizer(Path(task.model_path), trust_remote_code=task.trust_remote_code)
    check_vocabulary(tokenizer, Path(task.model_path))
    look()
    return Encoder(tokenizer, Options(**task.options), task.max_length)


def encode(task: Task, encoder: Encoder | None = None) -> dict[str, Any]:
    """Make tokens of a share of the samples; returns what is worth knowing.

    Raises:
        UsageError: the model cannot be used.
    """
    assert task.share is not None
    number, count = task.share
    folder, tally, marks = Path(task.folder), Tally(), Marks(Path(task.folder))
    starts = array("Q", numpy.load(folder / "starts.npy", allow_pickle=False).tobytes())
    goes = numpy.load(folder / "goes.npy", allow_pickle=False)
    share = numpy.array_split(numpy.flatnonzero(goes != LEFT), count)[number - 1]
    encoder = encoder or _encoder(task, lambda: marks.set(number, PROBE))
    made, cut = array("Q"), 0
    with writing(folder / f"part-{number}.safetensors") as writer:
        for at, line in zip(share.tolist(), Lines(folder / SAMPLES, starts).at(share), strict=True):
            marks.set(number, at)
            sample = sample_in(line)
            try:
                some = encoder.encode(sample)
            except Skip as skip:
                tally.add(skip.reason, [sample.place])
                continue
            for one in some:
                writer.add(one.ids, one.trained)
                made.append(at)
            cut += any(one.cut for one in some)
    marks.set(number, NOTHING)
    numpy.save(folder / f"part-{number}.npy", numpy.frombuffer(made, dtype=numpy.uint64))
    return {
        "number": number,
        "tally": tally.to_json(),
        "cut": cut,
        "notes": encoder.notes,
    }


# -------------------------------------------------------------------------------- the split


def _written(
    task: Task, spool: Spool, goes: Any, found: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], Any]:
    """Write the two sets; returns the statistics of each, and the samples for validation."""
    folder = Path(task.folder)
    parts = [TokenSet(folder / f"part-{one['number']}.safetensors") for one in found]
    made = numpy.concatenate(
        [numpy.load(folder / f"part-{one['number']}.npy", allow_pickle=False) for one in found]
    ).astype(numpy.int64)
    keys = numpy.frombuffer(spool.keys, dtype=numpy.uint64)
    hashes = numpy.frombuffer(spool.hashes, dtype=numpy.uint64)
    usable = numpy.unique(made)
    if task.found(VALID):
        valid = scan.shuffled(usable[goes[usable] == VALID], hashes, task.seed)
    else:
        valid = usable[scan.held_out(keys[usable], task.seed, task.valid_share, MAX_VALID)]
    train = numpy.setdiff1d(usable, valid)
    for name, chosen in (("train", train), ("valid", valid)):
        if not len(chosen):
            raise DataError(f"no {name} row is left: none of them can be used with this model")
    with (folder / "valid.samples").open("wb") as file:
        file.writelines(spool.samples.at(valid))
    stats = {name: _gathered(folder / f"{name}.safetensors", parts, made, chosen)
             for name, chosen in (("train", train), ("valid", valid))}  # fmt: skip
    for name, chosen in (("train", train), ("valid", valid)):
        first, last = numpy.searchsorted(made, chosen), numpy.searchsorted(made, chosen, side="right")
        with (folder / f"{name}.places").open("wb") as file:
            file.writelines(spool.places.at(numpy.repeat(chosen, last - first)))
    order = numpy.sort(hashes).tobytes()
    facts = {
        **stats,
        "cut": sum(one["cut"] for one in found),
        "source_sha256": scan.sha256_hex(order),
        "valid_rows_sha256": scan.sha256_hex(hashes[valid].tobytes()),
    }
    return facts, valid


def _write_prompts(
    folder: Path, encoder: Encoder, samples: Iterable[tuple[int, bytes]], marks: Marks
) -> None:
    """The ids that ask for the answers of the first samples, a line each, ``null`` where one cannot be asked
    for: whoever asks later renders nothing, and needs no limits of its own."""
    asked = 0
    with (folder / PROMPTS).open("w", encoding="utf-8") as file:
        for at, line in samples:
            marks.set(1, at)
            ids = prompt_of(encoder, sample_in(line))
            file.write(f"{json.dumps(ids)}\n")
            asked += ids is not None
            if asked == MAX_ANSWERS:
                break
    marks.set(1, NOTHING)


def _gathered(path: Path, parts: Sequence[TokenSet], made: Any, chosen: Any) -> dict[str, Any]:
    """Write the rows of the chosen samples in this order."""
    ends = numpy.cumsum([0, *map(len, parts)])
    first, last = numpy.searchsorted(made, chosen), numpy.searchsorted(made, chosen, side="right")
    with writing(path) as writer:
        for begin, end in zip(first.tolist(), last.tolist(), strict=True):
            for index in range(begin, end):
                part = int(numpy.searchsorted(ends, index, side="right")) - 1
                writer.add(*parts[part].row(index - int(ends[part])))
    return _stats(writer)


def _stats(writer: TokenWriter) -> dict[str, Any]:
    tokens = sum(writer.lengths)
    return {
        "rows": len(writer.lengths),
        "tokens": tokens,
        "target_tokens": sum(writer.targets),
        "max_row_tokens": max(writer.lengths),
        "mean_row_tokens": tokens / len(writer.lengths),
    }


# ------------------------------------------------------------------------------ the process


def main() -> None:
    """Do what the input says."""
    output = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is none of our lines

    def tell(message: Mapping[str, Any]) -> None:
        os.write(output, json.dumps(message).encode() + b"\n")

    task = Task(**read_json(sys.stdin.readline()))
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        tell({"done": work(task, tell) if task.share is None else encode(task)})
    except UsageError as error:
        tell({"error": str(error), "kind": type(error).__name__})
    except MemoryError:
        tell({"error": "there is not enough memory for it", "kind": "DataError"})
    _leave()


def _end_with_input() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def _leave() -> NoReturn:
    """At once: taking libraries apart takes seconds."""
    os._exit(0)


if __name__ == "__main__":
    main()
