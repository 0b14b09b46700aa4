"""What must hold for a run that was killed, as checks on its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from budgetsearch.core.events import Charged, Decided, Entry, Exported, Heartbeat, Noticed
from budgetsearch.core.history.fold import apply, fold
from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import needed_checkpoints
from budgetsearch.run.incumbent import TRIED_AGAIN
from budgetsearch.storage.ledger import read_entries
from budgetsearch.storage.ownership import SIGN
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.simulate.invariants import check
from budgetsearch.training import checkpoints, sums

KNOWN = (
    *("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "study.sqlite", "adapter", "checkpoints"),
    *("report.md", "report.json", "report.html", "settings.json", "versions.lock", "worker.log", "lock"),
    *("ledger.jsonl", "manifest.json", "artifacts", "ray", "study.state"),
)
"""All that a finished run leaves."""
SLACK = 0.2
"""Seconds between the last charge and the last entry, on a real clock."""


def check_adapter(folder: Path) -> dict[str, Any]:
    """Every file of an adapter is whole and they belong together; returns its manifest."""
    from safetensors.torch import load_file

    sums.check_sums(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    manifest: dict[str, Any] = json.loads((folder / "budgetsearch.json").read_text(encoding="utf-8"))
    assert tensors, "an adapter without weights"
    ranks = {t.shape[0] for name, t in tensors.items() if name.endswith("lora_A.weight")}
    assert ranks == {config["r"]} == {manifest["params"]["rank"]}, "weights and configuration differ"
    for name in ("README.md", "tokenizer.json"):
        assert (folder / name).stat().st_size > 0, f"{name} is empty"
    return manifest


def check_after_kill(run: Path, before: Sequence[Entry]) -> list[Entry]:
    """What must hold at any moment, however the process died; returns the ledger's entries."""
    folder = RunFolder(run)
    if not folder.has_ledger():
        return []
    entries = list(read_entries(folder.ledger))
    assert list(before) == entries[: len(before)], "the ledger lost or changed what it held"
    assert [e.seq for e in entries] == list(range(1, len(entries) + 1)), "an entry is missing"
    check_charges(entries)
    check_standing(run, entries)
    for name in sorted(needed_checkpoints(fold(entries))):
        checkpoints.load(folder.checkpoints / name)
    return entries


def check_standing(run: Path, entries: Sequence[Entry]) -> None:
    """The best adapter stands whole, from the decision after the first segment that finished well."""
    allowed = may_stand(entries)
    if None in allowed or not allowed:
        return
    assert (run / "adapter").is_dir(), "there is no adapter, though a segment has finished well"
    manifest = check_adapter(run / "adapter")
    assert (manifest["trial_id"], manifest["tokens"]) in allowed, "another adapter stands than the best"


def may_stand(entries: Sequence[Entry]) -> set[tuple[int, int] | None]:
    """Trial and tokens of whichever adapter may stand after these entries; None: there need not be any.

    On one worker the best stands before the next decision. On several the free ones get their jobs before a
    better adapter takes the place of the one that stands, but nobody hears of the jobs before it has; the
    first adapter of a run waits for no job. Where the disk had no room for the best, which the run says, an
    earlier one may stand until there is room.
    """
    history, known, decided, full = History(), set[tuple[int, int] | None](), False, False
    for entry in entries:
        several = history.plan is not None and history.plan.workers > 1
        if isinstance(entry.event, Noticed):
            full = full or entry.event.text.endswith(TRIED_AGAIN)
        elif isinstance(entry.event, Exported):
            full = False
        if full:
            decided = False
        elif isinstance(entry.event, Decided):
            decided = True
            known = known - {None} if several else set()
        elif decided and isinstance(entry.event, Heartbeat):
            known, decided = set(), False
        apply(history, entry)
        best = history.incumbent
        known.add((best.trial_id, best.best_tokens) if best else None)
    return known


def check_charges(entries: Sequence[Entry]) -> None:
    """No second is charged twice: at no entry is more charged than has passed, and time never runs back."""
    charged, at = 0.0, 0.0
    for entry in entries:
        assert entry.at >= at, f"time ran back at entry {entry.seq}"
        at = entry.at
        if isinstance(entry.event, Charged):
            assert entry.event.seconds > 0
            charged += entry.event.seconds
            assert charged <= at + 1e-6, f"entry {entry.seq}: {charged} s are charged of {at}"


def check_segments(history: History) -> None:
    """Each trial's tokens go up over its segments, without a gap and without an overlap."""
    reached: dict[int, int] = {}
    for segment, result in history.results:
        trial = segment.trial_id
        assert segment.start_tokens == reached.get(trial, 0), f"trial {trial}: tokens twice or left out"
        assert result.tokens >= segment.start_tokens
        if result.checkpoint_out:
            reached[trial] = result.tokens
    assert list(history.trials) == list(range(len(history.trials))), "a trial is lost"
    for number, state in history.trials.items():
        assert state.tokens == reached.get(number, 0)


def check_end(run: Path, *, loads: bool = True, mended: bool = False) -> History:
    """A run that was killed and resumed, at its end; ``mended``: its ledger had been damaged, or had lost
    its end, which the study still had."""
    folder = RunFolder(run)
    entries = list(read_entries(folder.ledger))
    history = fold(entries)
    assert history.opened is not None
    assert history.closed is not None
    assert history.closed.state == "finished", history.closed
    check(entries, history.opened.budget_seconds, replay=True, slack=SLACK)
    check_charges(entries)
    check_segments(history)
    assert math.isclose(sum(history.charged.values()), entries[-1].at, abs_tol=SLACK)
    best = history.incumbent
    assert best is not None, "no adapter"
    manifest = check_adapter(run / "adapter")
    assert (manifest["trial_id"], manifest["tokens"]) == (best.trial_id, best.best_tokens)
    if loads:
        check_loads(run / "adapter")
    assert not folder.in_use(), "the lock is still held"
    assert folder.report.stat().st_size > 0
    assert folder.versions.stat().st_size > 0
    json.loads(folder.settings.read_text(encoding="utf-8"))
    strays = [path.name for path in run.iterdir() if path.name not in KNOWN]
    if mended:
        strays = [name for name in strays if not name.startswith(("ledger.damaged-", "study-contradicts-"))]
    assert not strays, f"left behind: {strays}"
    names = {path.name for path in folder.checkpoints.iterdir()} - {SIGN}
    assert names == {best.best_checkpoint}, f"checkpoints that nothing needs: {names}"
    check_study(folder, history)
    return history


def check_loads(adapter: Path) -> None:
    """Plain PEFT loads it on its base."""
    from peft import PeftModel

    from budgetsearch.training.bases import load_base

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = load_base(config["base_model_name_or_path"], "fp32", "cpu")
    model = PeftModel.from_pretrained(base, adapter)
    assert any("lora_A" in name for name, _ in model.named_parameters())


def check_study(folder: RunFolder, history: History) -> None:
    """The Optuna study has every trial once, with the ledger's losses."""
    import optuna

    storage = f"sqlite:///{folder.study}"
    (summary,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=summary.study_name, storage=storage).get_trials(deepcopy=False)
    numbers = sorted(t.user_attrs["trial_id"] for t in trials if "trial_id" in t.user_attrs)
    assert numbers == sorted(history.trials), "the study and the ledger hold different trials"
    for trial in trials:
        state = history.trials[trial.user_attrs["trial_id"]]
        for rung, loss in state.losses.items():
            assert math.isclose(trial.intermediate_values[rung], loss, rel_tol=1e-6)
