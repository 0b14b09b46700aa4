"""Whether a run or an adapter still is what its manifest says: hashes, the ledger, and the scores again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from budgetsearch.compose import Say
from budgetsearch.core.errors import BudgetsearchError, EngineError
from budgetsearch.ledger import read_history
from budgetsearch.reproduction import compare
from budgetsearch.reproduction.bench import bench
from budgetsearch.reproduction.compare import Row
from budgetsearch.reproduction.inputs import Finding, Given, Inputs, compare_files, look, tokenize
from budgetsearch.reproduction.manifest import build
from budgetsearch.reproduction.replay import CARD_NOTE, installed, score_rows
from budgetsearch.reproduction.schema import MANIFEST, File, Found, Manifest, Scores, read
from budgetsearch.reproduction.tensors import ADAPTER_FILE
from budgetsearch.runfolder import RunFolder
from budgetsearch.training.inputs import file_facts

PARTS: Mapping[str, Callable[[Manifest], object]] = {
    "training": lambda m: m.training,
    "scores": lambda m: m.scores,
    "card": lambda m: (m.card, m.machine),
    "base": lambda m: m.base.files,
    "data": lambda m: (m.data.source_sha256, m.data.train, m.data.valid),
}
"""What the ledger tells as well."""


@dataclass(frozen=True)
class Verified:
    """What checking came to."""

    passes: bool
    findings: tuple[Finding, ...]
    """File by file."""
    rows: tuple[Row, ...]
    """The scores again; nothing without."""
    reasons: tuple[str, ...]
    """Why they may differ."""


def verify(
    run: Path,
    *,
    score: bool = True,
    given: Given = Given(),  # noqa: B008  # frozen
    tolerance: float | None = None,
    say: Say = lambda line: None,
) -> Verified:
    """Check every hash that the manifest names, and score the adapter again.

    A base that has changed is named and not loaded.

    Raises:
        UsageError: there is no manifest, it cannot be read, or the base needs code that is not allowed.
    """
    compare.check_tolerance(tolerance)
    found = read(run)
    adapter = adapter_folder(found)
    findings = [*_manifests(found), *_adapter(found, adapter)]
    inputs = look(found, given, say)
    if inputs.base_same:
        tokenize(inputs, found.manifest, say)
    elif inputs.base is not None:
        inputs.findings.append(
            Finding("rows and scores", "unchecked", "a base that has changed is not loaded")
        )
    findings += [*inputs.findings, *_ledger(found)]
    rows: list[Row] = []
    reasons: list[str] = []
    if score and found.manifest.scores is not None and (inputs.base_same or inputs.base is None):
        if inputs.prepared is None or not (adapter / ADAPTER_FILE).is_file():
            findings.append(Finding("scores", "missing", "base, data or adapter is not there to score with"))
        else:
            try:
                rows, reasons = _scored(found, found.manifest.scores, adapter, inputs, tolerance, say)
            except EngineError as error:
                findings.append(Finding("scores", "missing", str(error)))
    passes = all(finding.well for finding in findings) and compare.agree(rows)
    return Verified(passes, tuple(findings), tuple(rows), tuple(reasons))


def adapter_folder(found: Found) -> Path:
    """Of a run the folder inside of it, else where the manifest lies."""
    inside = found.folder / "adapter"
    return inside if inside.is_dir() else found.folder


def _manifests(found: Found) -> Iterator[Finding]:
    """The manifest against its own hash, and its copy in the adapter's folder against it."""
    what = found.path.name
    if found.expected == found.found:
        yield Finding(what, "unchanged")
    else:
        yield Finding(what, "changed", f"sha256 {found.found}, expected {found.expected}")
    copy = found.folder / "adapter" / MANIFEST
    if copy.is_file():
        other = read(copy)
        same = other.found == found.found
        detail = "" if same else f"sha256 {other.found}, {found.path} has {found.found}"
        yield Finding(f"adapter/{MANIFEST}", "unchanged" if same else "changed", detail)


def _adapter(found: Found, folder: Path) -> Iterator[Finding]:
    paths = [folder / file.name for file in found.manifest.adapter.files]
    there = [File(**file_facts(path)) for path in paths if path.is_file()]
    yield from compare_files("adapter", found.manifest.adapter.files, there, only_known=True)


def _ledger(found: Found) -> Iterator[Finding]:
    """Whether the ledger, where there is one, still tells the manifest's story."""
    folder, manifest = RunFolder(found.folder), found.manifest
    if not folder.ledger.is_file():
        return
    try:
        history = read_history(folder.ledger)
        again = build(history, folder, manifest.adapter)
    except (BudgetsearchError, OSError, ValueError, KeyError) as error:
        yield Finding("ledger.sqlite", "changed", str(error))
        return
    if again is None or len(history.results) != manifest.ledger_results:
        count = f"{len(history.results)} segments instead of {manifest.ledger_results}"
        advice = "if the run went on, `budgetsearch resume RUN` writes the manifest anew"
        yield Finding("ledger.sqlite", "changed", f"it holds {count}; {advice}")
        return
    other = [name for name, part in PARTS.items() if part(again) != part(manifest)]
    detail = f"it tells something else of the {', '.join(other)}" if other else ""
    yield Finding("ledger.sqlite", "changed" if other else "unchanged", detail)


def _scored(
    found: Found, scores: Scores, adapter: Path, inputs: Inputs, tolerance: float | None, say: Say
) -> tuple[list[Row], list[str]]:
    manifest = found.manifest
    with bench(manifest, inputs, say) as work:
        (work.folder.checkpoints / "adapter").symlink_to(adapter.absolute())
        score = work.score("adapter", scores)
    reasons = [CARD_NOTE] if manifest.card.get("device") != "cpu" else []
    reasons += compare.version_changes(manifest.versions, installed())
    reasons += compare.changes(scores.computed_on, score.computed_on)
    return score_rows(scores, score, exact=not reasons, tolerance=tolerance), reasons
