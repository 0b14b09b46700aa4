"""Whether a run or an adapter still is what its manifest says: hashes, the ledger, and the scores again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from budgetsearch.core.errors import EngineError
from budgetsearch.core.ports import Say
from budgetsearch.run.manifest_schema import Found, Scores
from budgetsearch.run.permissions import Places
from budgetsearch.tools.reproduce import compare
from budgetsearch.tools.reproduce.bench import bench
from budgetsearch.tools.reproduce.compare import Row
from budgetsearch.tools.reproduce.inputs import Finding, Inputs, look, tokenize
from budgetsearch.tools.reproduce.own import adapter_findings, adapter_folder, ledger_findings, opened
from budgetsearch.tools.reproduce.replay import CARD_NOTE, installed, score_rows


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
    given: Places = Places(),  # noqa: B008  # frozen
    tolerance: float | None = None,
    say: Say = lambda line: None,
) -> Verified:
    """Check every hash that the manifest names, and score the adapter again.

    What has changed is named, and not loaded.

    Raises:
        UsageError: there is no manifest, it cannot be read, or the base needs code that is not allowed.
    """
    compare.check_tolerance(tolerance)
    found, findings = opened(run)
    adapter = adapter_findings(found)
    findings += adapter
    inputs = look(found, given, say)
    if inputs.base_same:
        tokenize(inputs, found.manifest, say)
    elif inputs.base is not None:
        inputs.findings.append(
            Finding("rows and scores", "unchecked", "a base that has changed is not loaded")
        )
    findings += [*inputs.findings, *ledger_findings(found)]
    rows: list[Row] = []
    reasons: list[str] = []
    if score and found.manifest.scores is not None:
        if not all(finding.well for finding in adapter):
            findings.append(Finding("scores", "unchecked", "an adapter that has changed is not loaded"))
        elif inputs.base is None or (inputs.base_same and inputs.prepared is None):
            findings.append(Finding("scores", "missing", "base or data are not there to score with"))
        elif inputs.base_same:
            try:
                rows, reasons = _scored(found, found.manifest.scores, inputs, tolerance, say)
            except EngineError as error:
                findings.append(Finding("scores", "missing", str(error)))
    passes = all(finding.well for finding in findings) and compare.agree(rows)
    return Verified(passes, tuple(findings), tuple(rows), tuple(reasons))


def _scored(
    found: Found, scores: Scores, inputs: Inputs, tolerance: float | None, say: Say
) -> tuple[list[Row], list[str]]:
    manifest = found.manifest
    with bench(manifest, inputs, say) as work:
        (work.folder.checkpoints / "adapter").symlink_to(adapter_folder(found).absolute())
        score = work.score("adapter", scores)
    reasons = [CARD_NOTE] if manifest.card.get("device") != "cpu" else []
    reasons += compare.version_changes(manifest.versions, installed())
    reasons += compare.changes(scores.computed_on, score.computed_on)
    return score_rows(scores, score, exact=not reasons, tolerance=tolerance), reasons
