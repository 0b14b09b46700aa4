"""The Hugging Face Hub: whether it answers for the model and the data that are on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from budgetsearch.tools.doctor.check import Check, describe, fail, ok, warn
from budgetsearch.training.data.hub import parse
from budgetsearch.training.data.models import HUB_PATTERNS
from budgetsearch.training.data.origins import bare_of, on_hub

SECONDS = 5.0
"""How long the Hub may take to answer."""


@dataclass(frozen=True)
class Repository:
    """A model or a data set on the Hub, as it is known here and there."""

    name: str
    kind: str
    """``model`` or ``dataset``."""
    folder: Path | None
    """The complete copy in the local cache."""
    info: Any = None
    """The Hub's own description; None if it gives none."""
    problem: str = ""
    """Why it gives none, or not the files."""
    refused: bool = False
    """Whether the Hub answers, but not for this repository."""
    seconds: float = 0.0


def ask_model(name: str, revision: str | None) -> Repository:
    """Ask for a base model."""
    return _ask(name, "model", revision, _cached(name, "model", revision, HUB_PATTERNS))


def ask_data(source: str) -> Repository | None:
    """Ask for a data set of the Hub; None if the source is something else.

    Raises:
        DataError: it is not spelled like that.
    """
    if not on_hub(source):
        return None
    found = parse(bare_of(source))
    folder = _cached(found.name, "dataset", found.revision, [found.file] if found.file else ["*"])
    there = folder is not None and (folder / found.file).exists()
    return _ask(found.name, "dataset", found.revision, folder if there else None)


def _cached(name: str, kind: str, revision: str | None, patterns: Sequence[str]) -> Path | None:
    from huggingface_hub import snapshot_download

    ignored = ["*/*"] if kind == "model" else None
    try:
        return Path(
            snapshot_download(
                name,
                repo_type=kind,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=ignored,
                local_files_only=True,
            )
        )
    except (OSError, ValueError):  # not there, or not whole
        return None


def _ask(name: str, kind: str, revision: str | None, folder: Path | None) -> Repository:
    from huggingface_hub import HfApi, errors

    api, start = HfApi(), time.monotonic()
    info, problem, refused = None, "", False
    try:
        info = api.repo_info(
            name, repo_type=kind, revision=revision, timeout=SECONDS, files_metadata=kind == "model"
        )
        if info.gated and folder is None:
            api.auth_check(name, repo_type=kind)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        problem, refused = describe(error), True
    except Exception as error:  # the HTTP library's own exceptions differ between the Hub's versions
        problem = describe(error)
    return Repository(name, kind, folder, info, problem, refused, time.monotonic() - start)


def files_to_fetch(info: Any) -> dict[str, int]:
    """The files of a model that a run fetches, with their sizes."""
    return {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if "/" not in file.rfilename and any(fnmatch(file.rfilename, p) for p in HUB_PATTERNS)
    }


def hub(repositories: Sequence[Repository]) -> Check:
    """Whether the Hub answers where it is needed."""
    from huggingface_hub import constants

    if not repositories:
        return ok("hub", "not needed: neither model nor data are on it")
    missing = [r for r in repositories if r.problem and r.folder is None]
    if missing:
        return fail("hub", _complaint(missing[0]), _remedy(missing[0]))
    cached = [r for r in repositories if r.problem]
    if not cached:
        slowest = max(r.seconds for r in repositories)
        return ok("hub", f"{constants.ENDPOINT} answers in {slowest:.1f} s")
    text = f"{_complaint(cached[0])}; the copy in its cache is used"
    if constants.HF_HUB_OFFLINE:
        return ok("hub", text)
    return warn("hub", text, "Set HF_HUB_OFFLINE=1 to use the copy without asking.")


def _complaint(repository: Repository) -> str:
    from huggingface_hub import constants

    kept = "does not give" if repository.refused else "does not answer for"
    return f"{constants.ENDPOINT} {kept} the {repository.kind} {repository.name}: {repository.problem}"


def _remedy(repository: Repository) -> str:
    from huggingface_hub import constants

    if repository.refused:
        page = f"{constants.ENDPOINT}/{'datasets/' * (repository.kind == 'dataset')}{repository.name}"
        return f"Check the name and the revision; accept the terms at {page}, then run hf auth login."
    if constants.HF_HUB_OFFLINE:
        return "unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE, or give a local copy."
    flag = " --repo-type dataset" if repository.kind == "dataset" else ""
    return (
        f"Check the network, HTTPS_PROXY and HF_ENDPOINT. Or, where the Hub answers, run hf download "
        f"{repository.name}{flag} and give the local copy."
    )
