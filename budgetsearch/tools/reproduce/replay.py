"""Training the winner again from a manifest: the same passes beside the same neighbours, or alone."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from budgetsearch.core.codec import decode
from budgetsearch.core.course import Stint
from budgetsearch.core.errors import RunFolderError, UsageError
from budgetsearch.core.ports import Say
from budgetsearch.core.records import Score, Segment, SegmentResult, TrainJob
from budgetsearch.core.reports import Beat
from budgetsearch.run.manifest import ADAPTER_FILE, apart, load, tensors_sha256
from budgetsearch.run.manifest_schema import Found, Link, Manifest, Scores, read
from budgetsearch.run.permissions import Places
from budgetsearch.storage.files import fresh_folder, why_not
from budgetsearch.tools.reproduce import compare
from budgetsearch.tools.reproduce.bench import NO_LIMIT, Bench, Talk, bench
from budgetsearch.tools.reproduce.compare import Row
from budgetsearch.tools.reproduce.inputs import Inputs, look, tokenize

REPORT = "reproduction.json"
CONFIG_FILE = "adapter_config.json"
CARD_NOTE = "a card adds up in no fixed order, so its sums are never promised to be equal to the bit"
ALONE_NOTE = "--alone: without the neighbours the same sums round differently"
CHANGED_NOTE = "--anyway: an input has changed"
NO_COURSE_NOTE = "the run did not write down who trained side by side, so the winner trained alone"


@dataclass(frozen=True)
class Reproduced:
    """What training again came to."""

    agrees: bool
    exact: bool
    """Whether every sum should have rounded as it did, so that nothing may differ."""
    rows: tuple[Row, ...]
    reasons: tuple[str, ...]
    """Why something may differ."""
    out: Path | None
    """Where the reproduced adapter stands, if it was to be kept."""


def reproduce(
    run: Path,
    *,
    out: Path | None = None,
    alone: bool = False,
    anyway: bool = False,
    given: Places = Places(),  # noqa: B008  # frozen
    tolerance: float | None = None,
    say: Say = lambda line: None,
) -> Reproduced:
    """Train the winner of a run again, from its manifest and nothing else, and compare.

    Raises:
        UsageError: no manifest, or an input has changed or is missing; nothing was touched.
        EngineError: the worker cannot train here.
    """
    found = read(run)
    compare.check_tolerance(tolerance)
    if out is not None and (reason := why_not(out)):
        raise RunFolderError(f"--out {out} cannot be made ({reason}). Name a folder that does not exist yet.")
    inputs = ready(found, given, say, anyway=anyway)
    manifest = found.manifest
    seconds = sum(link.seconds for link in manifest.training)
    say(f"training trial {manifest.adapter.trial_id} again: {manifest.adapter.tokens} tokens in "
        f"{len(manifest.training)} segments, which took the run {seconds:.0f} s")  # fmt: skip
    with bench(manifest, inputs, say) as work:
        results = retrain(work, manifest, say, alone=alone)
        name = str(results[-1].checkpoint_out)
        score = work.score(name, manifest.scores) if manifest.scores else None
        reasons = (*([] if inputs.well else [CHANGED_NOTE]), *reasons_of(manifest, results, alone=alone))
        made = work.folder.checkpoints / name
        rows = (
            *training_rows(manifest, results, exact=not reasons),
            adapter_row(found, made / ADAPTER_FILE, exact=not reasons),
            *score_rows(manifest.scores, score, exact=not reasons, tolerance=tolerance),
        )
        outcome = Reproduced(compare.agree(rows), not reasons, rows, tuple(dict.fromkeys(reasons)), out)
        if out is not None:
            _keep(out, made, inputs, outcome)
    return outcome


def ready(found: Found, given: Places, say: Say, *, anyway: bool) -> Inputs:
    """Base, data and rows, insisting that they are what they were, unless ``anyway``.

    Raises:
        UsageError: something has changed, and it is named, or something is missing.
    """
    way_on = "Bring it back, or go on with --anyway: then the result says what differs."
    if found.expected != found.found and not anyway:
        raise UsageError(f"{found.path} changed: sha256 {found.found}, expected {found.expected}. {way_on}")
    inputs = look(found, given, say)
    trusted = given.trust_remote_code and found.manifest.settings.get("trust_remote_code")
    if trusted and inputs.base is not None and not inputs.base_same:
        raise UsageError(
            "The base model has changed, and code of its own may run: it is not loaded, --anyway or not."
            f"\n{inputs.problems}\nBring the old one back."
        )
    if inputs.well or anyway:
        tokenize(inputs, found.manifest, say)
    lost = any(finding.state == "missing" for finding in inputs.findings)
    if lost or inputs.prepared is None or not (inputs.well or anyway):
        raise UsageError(f"What the run was fed with is not what it was.\n{inputs.problems}\n{way_on}")
    return inputs


# -------------------------------------------------------------------------------- training


def retrain(work: Bench, manifest: Manifest, say: Say, *, alone: bool) -> list[SegmentResult]:
    """The winner's way again, from its first token to its last."""
    talk = Talk(say, sum(link.seconds for link in manifest.training))
    results: list[SegmentResult] = []
    trial, checkpoint, start = manifest.adapter.trial_id, None, 0
    for number, link in enumerate(manifest.training, start=1):
        job = job_of(link, trial, checkpoint, alone=alone)
        company = len(job.segments) - 1
        beside = f" beside {company} other{'s' if company > 1 else ''}" if company else ""
        label = f"segment {number} of {len(manifest.training)}{beside}"
        say(f"{label}: tokens {start} to {link.tokens}")
        result = work.train(job, link.computed_on.get("threads"), partial(_hear, talk, label, link, start))
        talk.done_seconds += link.seconds
        results.append(result)
        checkpoint, start = result.checkpoint_out, link.tokens
    return results


def _hear(talk: Talk, label: str, link: Link, start: int, beat: Beat) -> None:
    share = (beat.tokens - start) / max(1, link.tokens - start)
    talk.hear(beat, label, link.seconds, min(1.0, max(0.0, share)))


def job_of(link: Link, trial: int, checkpoint: str | None, *, alone: bool) -> TrainJob:
    """The job of a link: as it was, or with the winner alone and to the same token.

    A neighbour that had been trained before stands in with fresh weights that do not move.
    """
    segments: Sequence[Segment] = [decode(Segment, segment) for segment in link.segments]
    course: Sequence[Stint] = [decode(Stint, stint) for stint in link.course]
    mine = next(s for s in segments if s.trial_id == trial)
    mine = replace(mine, checkpoint_in=checkpoint, evaluate=False)
    if alone or not course:
        segments, course = [replace(mine, stop_tokens=link.tokens)], ()
    else:
        segments = [mine if s.trial_id == trial else _stand_in(s) for s in segments]
    return TrainJob(0, tuple(segments), 0, NO_LIMIT, course=tuple(course))


def _stand_in(segment: Segment) -> Segment:
    fresh = replace(segment, checkpoint_in=None, evaluate=False)
    return replace(fresh, params={**segment.params, "learning_rate": 0.0}) if segment.start_tokens else fresh


# ------------------------------------------------------------------------------ comparing


def reasons_of(manifest: Manifest, results: Sequence[SegmentResult], *, alone: bool) -> list[str]:
    """Why sums may round differently than they did."""
    found = [ALONE_NOTE] if alone else []
    if not alone and not all(link.course for link in manifest.training):
        found.append(NO_COURSE_NOTE)
    if manifest.card.get("device") != "cpu":
        found.append(CARD_NOTE)
        found += compare.changes(
            {"driver": str(manifest.machine.get("driver"))}, {"driver": str(_driver_version())}
        )
    found += compare.version_changes(manifest.versions, installed())
    for link, result in zip(manifest.training, results, strict=True):
        found += compare.changes(link.computed_on, result.computed_on)
    return list(dict.fromkeys(found))


def training_rows(manifest: Manifest, results: Sequence[SegmentResult], *, exact: bool) -> list[Row]:
    """Tokens of every segment, which must be the same anywhere, and where the training loss first differs."""
    then, now = (" ".join(str(part.tokens) for part in parts) for parts in (manifest.training, results))
    tokens = compare.equal_row("tokens after each segment", then, now)
    pairs = list(zip(manifest.training, results, strict=True))
    unequal = (n for n, (link, result) in enumerate(pairs) if link.train_loss != result.train_loss)
    first = next(unequal, None)
    link, result = pairs[-1 if first is None else first]
    where = "of every segment" if first is None else f"first differs in segment {first + 1}"
    loss = compare.loss_row(f"training loss, {where}", link.train_loss, result.train_loss, 0.0)
    if loss is None:
        return [tokens]
    if first is not None and not exact:
        loss = replace(loss, agrees=None, tolerance="shown")
    return [tokens, loss]


def adapter_row(found: Found, made: Path, *, exact: bool) -> Row:
    """The tensors; how far apart they are where the run's own still lie beside the manifest."""
    expected, weights = found.manifest.adapter.tensors_sha256, load(made)
    actual = tensors_sha256(weights)
    limit = "equal" if exact else "shown"
    short = (expected[:12], actual[:12])
    if expected == actual:
        return Row("adapter tensors", *short, "none, equal to the bit", limit, True)
    distance = "differ"
    for folder in (found.folder / "adapter", found.folder):
        original = folder / ADAPTER_FILE
        if original.is_file() and tensors_sha256(known := load(original)) == expected:
            gap = apart(known, weights)
            distance = "other shapes"
            if gap is not None:
                distance = f"{gap.largest:.2g} at most, {gap.relative:.2g} of the norm"
            break
    return Row("adapter tensors", *short, distance, limit, False if exact else None)


def score_rows(
    expected: Scores | None, found: Score | None, *, exact: bool, tolerance: float | None
) -> list[Row]:
    """Losses and accuracies of base and adapter."""
    if expected is None or found is None:
        return []
    exact = exact and expected.final
    allowed = compare.tolerance_of(expected.quantization, exact=exact, given=tolerance)
    rows = []
    for side in ("base", "adapter"):
        then, now = (getattr(score, f"{side}_loss") for score in (expected, found))
        rows.append(compare.loss_row(f"validation loss of the {side}", then, now, allowed))
        thens, nows = (getattr(score, f"{side}_example_losses") for score in (expected, found))
        rows.append(compare.examples_row(f"each example's, {side}", thens, nows, exact=exact))
        then, now = (getattr(score, f"{side}_accuracy") for score in (expected, found))
        what, same = f"task accuracy of the {side}", exact and _same_batches(expected)
        rows.append(compare.accuracy_row(what, then, now, expected.task_examples, exact=same))
    return [row for row in rows if row is not None]


def _same_batches(scores: Scores) -> bool:
    """Whether answers come in the batches of then: those in idle seconds began with a batch of their own."""
    from budgetsearch.training.score import answer_batch, answer_parts

    first, batch = scores.first_answers, answer_batch(scores.micro_batch)
    whole = answer_parts(0, scores.task_examples, batch)
    return scores.task_examples <= first or first in {part.stop for part in whole}


def installed() -> dict[str, str]:
    """Every installed package with its version."""
    return {(d.metadata["Name"] or "?").lower(): d.version for d in importlib.metadata.distributions()}


def _driver_version() -> str | None:
    from budgetsearch.training.data.provenance import driver_version

    return driver_version()


def _keep(out: Path, made: Path, inputs: Inputs, outcome: Reproduced) -> None:
    """The reproduced adapter with its tokenizer and the comparison, whole or not at all."""
    from budgetsearch.run.export import TOKENIZER_FILES

    assert inputs.base is not None
    found = {path for pattern in TOKENIZER_FILES for path in inputs.base.path.glob(pattern)}
    tokenizer = [path for path in sorted(found) if path.is_file()]
    with fresh_folder(out) as folder:
        for path in (made / ADAPTER_FILE, made / CONFIG_FILE, *tokenizer):
            shutil.copyfile(path, folder / path.name)
        text = json.dumps({**asdict(outcome), "out": None}, indent=2)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")
