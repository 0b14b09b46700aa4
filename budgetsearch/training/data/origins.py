"""Where rows come from: files, folders, patterns, data sets of the Hub, generated tasks, and mixtures."""

from __future__ import annotations

import glob
import itertools
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import DataError, nearest
from budgetsearch.core.ports import Say
from budgetsearch.training.data import gym, hub
from budgetsearch.training.data.lines import Broken, Read
from budgetsearch.training.data.rows import EXTENSIONS, KINDS, kind_of, read_rows

SHOWN_NAMES = 20
SPLIT_WORDS = re.compile(r"train|test|valid|val|dev|eval", re.IGNORECASE)
SPLIT = re.compile(r"split=([\w.-]+(?:\+[\w.-]+)*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
WEIGHT = re.compile(r"(.+)=(\d+(?:\.\d*)?|\.\d+)")
SAVED = ("dataset_dict.json", "state.json")
"""In a folder that the library datasets saved."""
WHAT_WORKS = f"a file, a folder, {gym.GYM}NAME, {hub.HUB}OWNER/NAME or {hub.HUB}OWNER/NAME/FILE.jsonl"


@dataclass(frozen=True)
class Cut:
    """A part of the rows of a split; numbers, or texts that end with ``%``."""

    start: str = ""
    stop: str = ""

    def of(self, rows: Callable[[], Iterator[Read]]) -> Iterator[Read]:
        """The rows that it leaves."""
        if not self.start and not self.stop:
            return rows()
        ends = [self.start or "0", self.stop or "100%"]
        total = sum(1 for _ in rows()) if any("%" in end or "-" in end for end in ends) else 0
        start, stop = (self._index(end, total) for end in ends)
        return itertools.islice(rows(), start, max(start, stop))

    @staticmethod
    def _index(end: str, total: int) -> int:
        index = round(float(end[:-1]) * total / 100) if end.endswith("%") else int(end)
        return max(0, index + total) if index < 0 else index


@dataclass(frozen=True)
class Located:
    """A source, found on this machine."""

    source: str
    files: tuple[Path, ...] = ()
    """None of a source that is generated."""
    folder: Path = Path()
    """Places are named from here."""
    valid: tuple[Path, ...] = ()
    """Files that the source itself sets apart for validation."""
    cut: Cut = field(default_factory=Cut)

    def names(self) -> dict[str, Path]:
        """Its files by the names that places have."""
        return {file.relative_to(self.folder).as_posix(): file for file in self.files}

    def held_out(self) -> Located | None:
        """The source's own validation set."""
        return replace(self, files=self.valid, valid=(), cut=Cut()) if self.valid else None

    def rows(self, say: Say = lambda _: None) -> Iterator[tuple[str, Mapping[str, Any] | Broken]]:
        """(place, row) of all its rows.

        Raises:
            DataError: it cannot be read.
        """
        if not self.files:
            return gym.rows(self.source)
        return self.cut.of(lambda: self._read(say))

    def _read(self, say: Say) -> Iterator[Read]:
        for name, file in self.names().items():
            if (file.parent / "state.json").is_file():
                yield from ((f"{name}:{place}", row) for place, row in _saved_rows(file.parent))
                continue
            if file.stat().st_size == 0 and len(self.files) == 1:
                raise DataError(f"{file} is empty; give a file with rows")
            yield from ((f"{name}:{place}", row) for place, row in read_rows(file, say))


@dataclass(frozen=True)
class Origin:
    """One of the sources of a run."""

    source: str
    weight: float | None = None
    """Its share of a mixture; None: all its rows."""
    columns: str = ""

    def at(self, place: str) -> str:
        """As it is written where it lies at another place."""
        return place if self.weight is None else f"{place}={self.weight:g}"


def origins_of(data: str, columns: str | None = None) -> tuple[Origin, ...]:
    """The sources that ``data`` names, one a line, each with its weight; ``columns`` one a line too, or one
    for all of them.

    Raises:
        DataError: weights or columns do not fit the sources.
    """
    named = [line.strip() for line in data.splitlines() if line.strip()]
    given = [line.strip() for line in (columns or "").split("\n")]
    if len(given) not in (1, len(named)):
        raise DataError(
            f"--columns is given {len(given)} times for {len(named)} sources; give it once for all of them, "
            "or once for each, in their order ('' where a source needs none)"
        )
    found = [_weighed(source) for source in named]
    if len({weight is None for _, weight in found}) > 1:
        raise DataError("some sources of --data have a weight and others none; give each SOURCE=WEIGHT")
    given = given * len(named) if len(given) == 1 else given
    return tuple(Origin(source, weight, text) for (source, weight), text in zip(found, given, strict=True))


def _weighed(source: str) -> tuple[str, float | None]:
    match = WEIGHT.fullmatch(source)
    if not match or Path(source).expanduser().exists() or re.search(r"[?&]\w+$", match.group(1)):
        return source, None  # a parameter of the source itself ends it
    if not float(match.group(2)):
        raise DataError(f"--data {source}: a weight must be above 0; leave the source out instead")
    return match.group(1), float(match.group(2))


def check_spelling(source: str) -> bool:
    """Check what can be checked without network; returns whether the source lies on the Hub.

    Raises:
        DataError: it is misspelt, or is not there.
    """
    if source.startswith(gym.GYM):
        gym.dataset_of(source)
    elif on_hub(source):
        hub.parse(_without_split(source)[0])
        return True
    else:
        _local(_without_split(source)[0])
    return False


def on_hub(source: str) -> bool:
    """Whether it is a data set of the Hub, by its prefix or because it looks like one and is not here."""
    if source.startswith(gym.GYM):
        return False
    bare = _without_split(source)[0]
    if bare.startswith(hub.HUB):
        return True
    path = Path(bare).expanduser()
    here = path.parent.is_dir() and path.parent != Path() and nearest(path.name, _siblings(path))
    return bool(hub.ID.fullmatch(bare)) and kind_of(path) is None and not path.exists() and not here


def bare_of(source: str) -> str:
    """The source without its split."""
    return _without_split(source)[0]


def locate(source: str, say: Say = lambda _: None) -> Located:
    """Find a source, fetching what lies on the Hub.

    Raises:
        DataError: it is not there, or cannot be reached.
    """
    if source.startswith(gym.GYM):
        gym.dataset_of(source)
        return Located(source)
    bare, split, cut = _without_split(source)
    if on_hub(source):
        folder, splits = hub.fetch(bare)
        return _chosen(Located(source, folder=folder, cut=cut), splits, split, say)
    found = _local(bare)
    if isinstance(found, list):
        common = found[0].parent if len({file.parent for file in found}) == 1 else Path(found[0].anchor)
        return Located(source, tuple(found), common, cut=cut)
    if found.is_dir():
        return _chosen(Located(source, folder=found, cut=cut), _splits_of(found), split, say)
    if split and split != "train":
        raise DataError(f"{source}: a single file has no splits; leave out ?split={split}")
    return Located(source, (found,), found.parent, cut=cut)


def copy_source(source: str, folder: Path) -> str:
    """Copy what a local source reads into a new folder; returns the source as it is named there.

    Of a folder what is hidden or a link stays behind: no row is read from a ``.git``, and a link may lead
    to what is not for others.

    Raises:
        DataError: it is not there, or a pattern means files of several folders.
    """
    bare = _without_split(source)[0]
    found, query = _local(bare), source[len(bare) :]
    folder.mkdir(parents=True)
    if isinstance(found, list):
        if len({file.parent for file in found}) > 1:
            raise DataError(
                f"{source} means files of several folders, which cannot be copied as they are; give each "
                "folder as a source of its own"
            )
        for file in found:
            shutil.copyfile(file, folder / file.name)
        return f"{folder / Path(bare).name}{query}"
    found = found.absolute()
    name = found.resolve().name if found.is_dir() else found.name
    if not found.is_dir():
        shutil.copyfile(found, folder / name)
        return f"{folder / name}{query}"
    mine = folder.resolve()

    def left(place: str, names: list[str]) -> list[str]:
        paths = [Path(place) / one for one in names]
        return [
            p.name for p in paths if p.name[0] == "." or p.is_symlink() or mine.is_relative_to(p.resolve())
        ]

    shutil.copytree(found, folder / name, ignore=left)
    return f"{folder / name}{query}"


def _without_split(source: str) -> tuple[str, str, Cut]:
    bare, sign, query = source.rpartition("?")
    if not sign or Path(source).expanduser().exists() or glob.has_magic(bare) or "=" not in query:
        return source, "", Cut()
    match = SPLIT.fullmatch(query)
    if not match:
        raise DataError(f"{source}: ?{query} is not ?split=NAME, such as ?split=train or ?split=train[:90%]")
    name, cut = match.group(1), Cut(match.group(2) or "", match.group(3) or "")
    if "+" in name and cut != Cut():
        raise DataError(
            f"{source}: only one split can be cut; give each as a source of its own, such as "
            "?split=train[:90%]"
        )
    return bare, name, cut


def _chosen(found: Located, splits: Mapping[str, Sequence[Path]], asked: str, say: Say) -> Located:
    """The rows to train on, and those that the source sets apart."""
    name = asked or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    names = name.split("+")
    if missing := [one for one in names if one not in splits]:
        raise DataError(
            f"{found.source} has no split {missing[0]!r}; it has {', '.join(sorted(splits))}: name one with "
            "?split=NAME"
        )
    files = [file for one in dict.fromkeys(names) for file in splits[one]]
    if unread := [file for file in files if kind_of(file) is None]:
        raise DataError(
            f"{found.source} holds {unread[0].name}, which is none of {', '.join(EXTENSIONS)}; convert it to "
            "JSONL"
        )
    valid = splits.get("validation", ()) if not asked else ()
    if others := sorted(set(splits) - {*names} - ({"validation"} if valid else set())):
        say(f"{found.source}: {name} is trained on; {', '.join(others)} is left alone")
    return replace(found, files=tuple(files), valid=tuple(valid))


# ---------------------------------------------------------------------------------- files


def _local(source: str) -> Path | list[Path]:
    """The file or folder of this name, or the files that a pattern means."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        if kind_of(path) is None:
            raise DataError(f"{path} is none of {', '.join(EXTENSIONS)}; convert it to JSONL")
        return path
    if glob.has_magic(source):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if found := [file for file in files if file.is_file() and _is_data(file, file.parent)]:
            return found
        raise DataError(f"no file of {', '.join(EXTENSIONS)} is named like {source!r}; look at the pattern")
    raise DataError(
        f"there is no data file at {source!r}{nearest(path.name, _siblings(path))}; give {WHAT_WORKS}"
    )


def _siblings(path: Path) -> list[str]:
    return [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []


def _is_data(file: Path, folder: Path) -> bool:
    """Whether a file holds rows: neither hidden, nor temporary, nor of another kind."""
    parts = file.relative_to(folder).parts
    return kind_of(file) is not None and not any(part.startswith((".", "_")) for part in parts)


def _splits_of(folder: Path) -> Mapping[str, Sequence[Path]]:
    """The files of rows in a folder, by split.

    Raises:
        DataError: it holds none, or some of several kinds.
    """
    if any((folder / name).is_file() for name in SAVED):
        return _saved_splits(folder)
    names = sorted(
        one.relative_to(folder).as_posix() + "/" * one.is_dir()
        for one in folder.rglob("*")
        if not any(part.startswith(".") for part in one.relative_to(folder).parts)
    )
    files = [folder / name for name in names if not name.endswith("/") and _is_data(folder / name, folder)]
    configured = (folder / "README.md").is_file() and "configs:" in _head(folder / "README.md")
    if not configured and len({kind_of(file) for file in files}) != 1:
        problem = "files of several kinds" if files else f"no file of {', '.join(KINDS)}"
        there = ", ".join(names[:SHOWN_NAMES]) or "nothing"
        raise DataError(
            f"the folder {folder} holds {problem}: {there}; name one of its files, or leave those of one "
            "kind in it"
        )
    if configured or any(SPLIT_WORDS.search(file.relative_to(folder).as_posix()) for file in files):
        splits = hub.splits_of(str(folder))
        kept = {name: [file for file in some if file in files] for name, some in splits.items()}
        return {name: some for name, some in kept.items() if some}
    return {"train": files}


def _head(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as text:
        return text.read(1 << 16)


def _saved_splits(folder: Path) -> Mapping[str, Sequence[Path]]:
    """One file for each split that the library datasets saved: its rows may be spread over many."""
    inside = sorted(one for one in (folder, *folder.iterdir()) if (one / "state.json").is_file())
    first = {one: next(iter(sorted(one.glob("*.arrow"))), None) for one in inside}
    return {("train" if one == folder else one.name): [file] for one, file in first.items() if file}


def _saved_rows(folder: Path) -> Iterator[Read]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{folder} cannot be read as a saved data set: {error}; save it again") from error
