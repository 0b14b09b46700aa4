"""Data sets of the Hugging Face Hub: their files, by split, in the Hub's cache on this machine.

No code of a data set runs: the library datasets finds out which files belong to a split, and the rows are
read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from budgetsearch.core.errors import DataError
from budgetsearch.training.data.rows import EXTENSIONS, kind_of
from budgetsearch.training.quiet import quiet

HUB = "hub:"
ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?::[\w.+-]+)?(?:@[\w./-]+)?")
ASK_SECONDS = 10.0
"""How long the Hub may take to say what it has."""


@dataclass(frozen=True)
class Address:
    """What a ``hub:`` source names."""

    name: str
    file: str = ""
    """Empty: all of a subset."""
    subset: str = ""
    revision: str | None = None


def parse(source: str) -> Address:
    """Read ``hub:OWNER/NAME[:SUBSET][@REVISION]`` or ``hub:OWNER/NAME/FILE[@REVISION]``.

    Raises:
        DataError: it is neither.
    """
    bare = source.removeprefix(HUB)
    one = re.fullmatch(r"([\w.-]+/[\w.-]+)/([^@]+?)(?:@([^@]+))?", bare)
    if one and kind_of(Path(one.group(2))):
        return Address(one.group(1), file=one.group(2), revision=one.group(3))
    name, _, revision = bare.partition("@")
    if one or not ID.fullmatch(bare) or kind_of(Path(name)):
        raise DataError(
            f"{source!r} is neither {HUB}OWNER/NAME[:SUBSET][@REVISION] nor {HUB}OWNER/NAME/FILE[@REVISION] "
            f"with a file of {', '.join(EXTENSIONS)}; write it like one of them"
        )
    name, _, subset = name.partition(":")
    return Address(name, subset=subset, revision=revision or None)


def fetch(source: str) -> tuple[Path, Mapping[str, Sequence[Path]]]:
    """The folder of a data set in the cache, and its files by split.

    Raises:
        DataError: it cannot be reached, or lacks what the source names.
    """
    import huggingface_hub
    from huggingface_hub import errors

    wanted = parse(source)
    version = wanted.revision or "main"
    try:
        folder = Path(_file(wanted) if wanted.file else _snapshot(wanted))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise DataError(
            f"the Hub does not give the dataset {wanted.name!r} at revision {version}: it does not exist, is "
            "private, or its terms want to be accepted on huggingface.co; then run hf auth login"
        ) from error
    except (
        errors.HfHubHTTPError,
        huggingface_hub.errors.LocalEntryNotFoundError,
        OSError,
        ValueError,
    ) as error:
        raise DataError(
            f"the Hugging Face Hub cannot be reached for {source!r} ({str(error).splitlines()[0]}), and it "
            "is not in its local cache; fetch it on another machine and give the local file"
        ) from error
    if not wanted.file:
        return folder, splits_of(str(folder), wanted.subset)
    if not (folder / wanted.file).is_file():
        raise DataError(f"the dataset {wanted.name!r} has no file {wanted.file!r} at revision {version}")
    return folder, {"train": [folder / wanted.file]}


def splits_of(folder: str, subset: str = "") -> dict[str, list[Path]]:
    """The files of each split, as the data set's own README or the names of its files have them.

    Raises:
        DataError: there are none, or no such subset.
    """
    import datasets

    datasets.logging.set_verbosity_error()
    try:
        with quiet():
            builder = datasets.load_dataset_builder(folder, subset or None)
    except Exception as error:  # whatever a stranger's README makes of it
        words = " ".join(str(error).split())
        raise DataError(f"{folder} is no data set that can be read: {words[:400]}") from error
    files = builder.config.data_files or {}
    return {str(name): [Path(str(file)) for file in some] for name, some in files.items()}


def _file(wanted: Address) -> str:
    import huggingface_hub

    # Unlike hf_hub_download, this does not retry for 23 s where there is no network.
    return str(
        huggingface_hub.snapshot_download(
            wanted.name, repo_type="dataset", revision=wanted.revision, allow_patterns=[wanted.file]
        )
    )


def _snapshot(wanted: Address) -> str:
    """All of the data set that can be rows, or what the cache has of it where the Hub is out of reach."""
    import huggingface_hub
    from huggingface_hub import errors

    patterns = ["README.md", *(f"*{ending}{pack}" for ending in _ENDINGS for pack in ("", ".gz", ".zst"))]
    try:
        sha = (
            huggingface_hub.HfApi()
            .dataset_info(wanted.name, revision=wanted.revision, timeout=ASK_SECONDS)
            .sha
        )
        patterns = _needed(wanted, sha) or patterns
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception:  # offline, in any of the ways in which libraries say so
        sha = None
    return str(
        huggingface_hub.snapshot_download(
            wanted.name,
            repo_type="dataset",
            revision=sha or wanted.revision,
            allow_patterns=patterns,
            local_files_only=sha is None,
        )
    )


_ENDINGS = EXTENSIONS


def _needed(wanted: Address, sha: str | None) -> list[str]:
    """Only the files of the wanted subset: a repository may hold a hundred others."""
    import datasets

    with quiet():
        builder = datasets.load_dataset_builder(wanted.name, wanted.subset or None, revision=sha)
    found = [str(file) for some in (builder.config.data_files or {}).values() for file in some]
    return ["README.md", *(file.partition(f"@{sha}/")[2] for file in found if f"@{sha}/" in file)]
