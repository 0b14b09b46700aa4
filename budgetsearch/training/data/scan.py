"""The first look at all rows: each becomes a sample in one file, and a few numbers of it stay in memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy

from budgetsearch.core.errors import DataError
from budgetsearch.core.ports import Say
from budgetsearch.training.data.samples import Look, Source, prompt_key, short_hash
from budgetsearch.training.data.tally import Tally

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[numpy.int64]
    Keys = NDArray[numpy.uint64]

SAMPLES = "samples"
TRAIN, VALID, LEFT = 0, 1, 2
"""Where a sample goes: LEFT are those that a mixture, --max-rows or the validation rows keep out."""

# --------------------------------------------------------------------------------- the spool


class Lines:
    """A file of lines, of which only the places are in memory."""

    def __init__(self, path: Path, starts: array[int] | None = None) -> None:
        self.path, self.starts = path, starts or array("Q", [0])

    def append(self, file: BinaryIO, line: bytes) -> None:
        """Write one more."""
        file.write(line)
        self.starts.append(self.starts[-1] + len(line))

    def at(self, numbers: Sequence[int] | Ints) -> Iterator[bytes]:
        """Some of them."""
        with self.path.open("rb") as file:
            for number in numbers:
                file.seek(self.starts[number])
                yield file.read(self.starts[number + 1] - self.starts[number])


class Spool:
    """Samples and their places in two files, in the order of the sources; of each some numbers in memory."""

    def __init__(self, folder: Path) -> None:
        self.samples, self.places = Lines(folder / SAMPLES), Lines(folder / "places")
        self.keys, self.hashes = array("Q"), array("Q")
        self.sources = array("H")
        """Which source each is from."""

    def fill(self, sources: Sequence[Source], tally: Tally, say: Say, look: Look) -> None:
        """Write the samples of all sources.

        Raises:
            DataError: one cannot be read.
        """
        with self.samples.path.open("wb") as file, self.places.path.open("wb") as places:
            for number, source in enumerate(sources):
                for sample in source.samples(tally, say, look):
                    bare = json.dumps(replace(sample, place=""), default=vars, ensure_ascii=False)
                    place = sample.place.replace("\n", " ")
                    try:
                        line = f"{bare}\t{json.dumps(place)}\n".encode()
                    except UnicodeEncodeError:
                        tally.add("it holds half a character", [sample.place])
                        continue
                    self.samples.append(file, line)
                    self.places.append(places, place.encode("utf-8", "replace") + b"\n")
                    self.keys.append(prompt_key(sample))
                    self.hashes.append(short_hash(bare))
                    self.sources.append(number)

    def __len__(self) -> int:
        return len(self.keys)


def sha256_hex(data: bytes) -> str:
    """Its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------ who goes where


def ranks(keys: Keys, seed: int) -> Keys:
    """A random number for each key, a pure function of key and seed (splitmix64)."""
    with numpy.errstate(over="ignore"):
        mixed = keys ^ numpy.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        mixed = (mixed ^ (mixed >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> numpy.uint64(31))


def mixed(sources: Ints, weights: Sequence[float], hashes: Keys, seed: int) -> Ints:
    """The samples of the largest mixture with these weights in which none is there twice, in their order."""
    counts = numpy.bincount(sources, minlength=len(weights))
    whole = min(count / weight for count, weight in zip(counts, weights, strict=True))
    kept = [
        sampled(numpy.flatnonzero(sources == number), max(1, round(weight * whole)), hashes, seed)
        for number, weight in enumerate(weights)
    ]
    return numpy.sort(numpy.concatenate(kept))


def sampled(numbers: Ints, most: int, hashes: Keys, seed: int) -> Ints:
    """A seeded sample of so many of these samples, in their order."""
    if most >= len(numbers):
        return numbers
    order = numpy.argsort(ranks(hashes[numbers], seed), kind="stable")
    return numpy.sort(numbers[order[:most]])


def shuffled(numbers: Ints, hashes: Keys, seed: int) -> Ints:
    """The same in an order that the seed decides."""
    return numbers[numpy.argsort(ranks(hashes[numbers], seed), kind="stable")]


def held_out(keys: Keys, seed: int, share: float, most: int) -> Ints:
    """Which samples are for validation, in a random order: a pure function of the arguments.

    Samples with equal keys stay together.

    Raises:
        DataError: there are not two different keys.
    """
    groups, group_of, sizes = numpy.unique(keys, return_inverse=True, return_counts=True)
    if len(groups) < 2:
        raise DataError(
            "a split needs rows with two different prompts at least; add rows, or name a validation file"
        )
    order = numpy.argsort(ranks(groups, seed), kind="stable")
    room = max(1, min(most, round(len(keys) * share)))
    place = numpy.full(len(groups), -1, dtype=numpy.int64)
    taken = 0
    for number, group in enumerate(order[1:].tolist()):  # the first group always trains
        if taken + sizes[group] <= room:
            taken += int(sizes[group])
            place[group] = number
        if taken == room:
            break
    if not taken:
        place[min(order.tolist(), key=lambda group: int(sizes[group]))] = 0
    places = place[group_of]
    chosen = numpy.flatnonzero(places >= 0)
    return chosen[numpy.argsort(places[chosen], kind="stable")]
