"""What a run wrote itself, against its manifest: the manifest's copy, the adapter's files, the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from budgetsearch.core.errors import BudgetsearchError, UsageError
from budgetsearch.core.history.history import History
from budgetsearch.run.manifest import ADAPTER_FILE, UNSUMMED, build
from budgetsearch.run.manifest_schema import MANIFEST, File, Found, Manifest, read
from budgetsearch.storage.ledger import Survey, damaged, read_history, survey
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.reproduce.inputs import Finding, compare_files
from budgetsearch.training.data.provenance import file_facts

PARTS: Mapping[str, Callable[[Manifest], object]] = {
    "training": lambda m: m.training,
    "scores": lambda m: m.scores,
    "card": lambda m: (m.card, m.machine),
    "base": lambda m: m.base.files,
    "data": lambda m: (m.data.source_sha256, m.data.train, m.data.valid),
}
"""What the ledger tells as well."""
RUNNABLE = (
    *(".py", ".pyc", ".so", ".sh", ".exe", ".dll"),
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy"),
)
"""Ends of the names of code, and of files that can run code while they are loaded."""
CONFIG_FILE = "adapter_config.json"


def is_run(folder: RunFolder) -> bool:
    """Whether a run lies there, whatever is left of it: no adapter that travelled, no lone manifest."""
    return folder.has_ledger() or folder.settings.is_file() or folder.adapter.is_dir()


def adapter_folder(found: Found) -> Path:
    """Of a run the folder inside of it, else where the manifest lies."""
    folder = RunFolder(found.folder)
    return folder.adapter if is_run(folder) else found.folder


# ------------------------------------------------------------------------------ manifest


def opened(where: Path) -> tuple[Found, list[Finding]]:
    """The manifest of a run, of an adapter or by its path, and what is wrong with it and its copy.

    Where a run's own is gone or damaged the copy in its adapter's folder stands in.

    Raises:
        UsageError: there is none that can be read.
    """
    path = where / MANIFEST if where.is_dir() else where
    copy = path.parent / "adapter" / MANIFEST
    try:
        found = read(where)
    except UsageError as error:
        try:
            found = replace(read(copy), path=path)
        except UsageError:
            raise error from None
        state, why = ("damaged", str(error)) if path.is_file() else ("missing", "it is gone")
        return found, [Finding(path.name, state, f"{why}; adapter/{MANIFEST} stands in")]
    whole = found.expected == found.found
    sums = f"sha256 {found.found}, expected {found.expected}"
    first = Finding(path.name, "unchanged") if whole else Finding(path.name, "changed", sums)
    return found, [first, *_copy(found, copy)]


def _copy(found: Found, copy: Path) -> Iterator[Finding]:
    """The manifest's copy in the adapter's folder against the manifest."""
    what = f"adapter/{MANIFEST}"
    if not copy.is_file():
        if is_run(RunFolder(found.folder)):
            yield Finding(what, "missing", "the adapter would travel without it; it is a copy of the run's")
        return
    try:
        other = read(copy)
    except UsageError as error:
        yield Finding(what, "damaged", str(error))
        return
    same = other.found == found.found
    detail = "" if same else f"sha256 {other.found}, {found.path} has {found.found}"
    yield Finding(what, "unchanged" if same else "changed", detail)


# ------------------------------------------------------------------------------- adapter


def adapter_findings(found: Found) -> list[Finding]:
    """Each file of the adapter, and what lies beside them and was not exported."""
    folder, expected = adapter_folder(found), found.manifest.adapter.files
    names = {file.name for file in expected}
    there = [File(**file_facts(path)) for name in names if (path := folder / name).is_file()]
    return [*compare_files("adapter", expected, there), *_others(folder, names)]


def _others(folder: Path, names: set[str]) -> Iterator[Finding]:
    """What the export did not write: a note tells of it. Code, or what runs code when it is loaded, has no
    business there."""
    if not any((folder / name).is_file() for name in (ADAPTER_FILE, CONFIG_FILE)):
        return  # a manifest by itself, in a folder of other things
    for path in sorted(folder.iterdir()):
        if path.name in names or path.name in UNSUMMED:
            continue
        if path.suffix.lower() in RUNNABLE:
            yield Finding(f"adapter {path.name}", "new", "it can run code and was not exported: remove it")
        else:
            yield Finding(f"adapter {path.name}", "noted", "it was not exported")


# -------------------------------------------------------------------------------- ledger


def ledger_findings(found: Found) -> list[Finding]:
    """Whether ledger and backup are there and whole, and still tell the manifest's story."""
    folder = RunFolder(found.folder)
    if not is_run(folder):
        return []
    if not folder.has_ledger():
        why = f"and {folder.backup.name} too: bring one of them back from a copy"
        return [Finding(folder.ledger.name, "missing", why)]
    try:
        seen = survey(folder.ledger)
        if not seen.rows:
            return [Finding(folder.ledger.name, "damaged", damaged(folder.ledger, seen.problem or seen.flaw))]
        history = read_history(folder.ledger)
        going = folder.goes(history.closed is not None)
        wrong = _damage(folder, seen, going)
        told = _story(found, folder, history, going)
    except (BudgetsearchError, OSError, ValueError, KeyError) as error:
        return [Finding(folder.ledger.name, "unchecked", str(error))]
    if told.well and any(finding.what == told.what for finding in wrong):
        return wrong
    return [*wrong, told]


def _damage(folder: RunFolder, seen: Survey, going: bool) -> list[Finding]:
    """What is wrong with the two files. A run that is going may be about to write the last lines."""
    remedy = "`budgetsearch resume RUN` makes it whole from the other"
    found = []
    if not folder.ledger.is_file():
        found.append(Finding(folder.ledger.name, "missing", remedy))
    elif seen.problem:
        lost = f", and at least {seen.lost} events are in neither file" if seen.lost else ""
        found.append(Finding(folder.ledger.name, "damaged", f"{seen.problem}{lost}; {remedy}"))
    whole = sum(one == other for one, other in zip(seen.copy.rows, seen.rows, strict=False))
    if not folder.backup.is_file():
        found.append(Finding(folder.backup.name, "missing", remedy))
    elif seen.flaw:
        found.append(Finding(folder.backup.name, "damaged", f"{seen.flaw}; {remedy}"))
    elif not going and (whole < len(seen.rows) or seen.copy.torn):
        count = f"{whole} of {len(seen.rows)} events are whole in it"
        found.append(Finding(folder.backup.name, "damaged", f"{count}; {remedy}"))
    else:
        found.append(Finding(folder.backup.name, "unchanged"))
    return found


def _story(found: Found, folder: RunFolder, history: History, going: bool) -> Finding:
    """Whether the ledger tells what the manifest does."""
    name, manifest = folder.ledger.name, found.manifest
    again = build(history, folder, manifest.adapter)
    if again is None or len(history.results) != manifest.ledger_results:
        count = f"{len(history.results)} segments instead of {manifest.ledger_results}"
        advice = (
            "the run is still going, and the manifest is older; verify it when it is over"
            if going
            else "if the run went on, `budgetsearch resume RUN` writes the manifest anew"
        )
        return Finding(name, "changed", f"it holds {count}; {advice}")
    other = [part for part, of in PARTS.items() if of(again) != of(manifest)]
    detail = f"it tells something else of the {', '.join(other)}" if other else ""
    return Finding(name, "changed" if other else "unchanged", detail)
