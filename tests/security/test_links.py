"""What a run writes: into its own files, and never where a link in their place leads."""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import budgetsearch
from budgetsearch.core.errors import BudgetsearchError, RunFolderError
from budgetsearch.engines.local import LocalEngine
from budgetsearch.run.failure import keep_traceback
from budgetsearch.storage.backup import Backup, Copy
from budgetsearch.storage.files import fresh_folder, locked, replace_file, replace_text
from budgetsearch.storage.ledger import Ledger
from budgetsearch.storage.lock import RunLock
from budgetsearch.storage.runfolder import RunFolder, is_own

PACKAGE = Path(budgetsearch.__file__).parent
WRITERS: dict[str, Callable[[Path], Any]] = {
    "lock": lambda run: RunLock(run).sign(),
    "ledger.sqlite": lambda run: Ledger(run / "ledger.sqlite"),
    "ledger.jsonl": lambda run: Backup(run / "ledger.jsonl", [], Copy([])),
    "worker.log": lambda run: LocalEngine(None, run / "worker.log").warm_up(),
    "traceback.log": lambda run: keep_traceback(ValueError("x"), run),
    ".settings.json.new": lambda run: replace_file(run / "settings.json", b"ours"),
    "settings.json": lambda run: replace_file(run / "settings.json", b"ours"),
    ".report.md.PID.tmp": lambda run: replace_text(run / "report.md", "ours"),
    "report.md": lambda run: replace_text(run / "report.md", "ours"),
    "cache.lock": lambda run: locked(run / "cache").__enter__(),
}
"""A name in the folder, and what writes to it."""
FRESH = {
    "training/checkpoints.py": 2,
    "training/adapters_recipe.py": 1,
    "training/data/tokens.py": 1,
    "training/data/preparer.py": 4,
    "training/data/scan.py": 2,
    "training/data/store.py": 3,
    "training/data/supervise.py": 1,
    "training/data/models.py": 2,
    "training/sums.py": 1,
    "training/memory.py": 1,
    "training/metric_process.py": 1,
    "training/recipes/folders.py": 1,
    "training/recipes/objective.py": 1,
    "run/export.py": 4,
    "run/recipes.py": 2,
    "tools/export/command.py": 4,
    "training/data/origins.py": 1,
    "training/data/encoding.py": 1,
    "tools/submit/rehearsal.py": 1,
    "tools/submit/packages.py": 1,
    "tools/submit/command.py": 1,
    "tools/reproduce/replay.py": 1,
    "engines/shared.py": 1,
    "engines/worker.py": 1,
    "tools/doctor/probe.py": 1,
    "tools/doctor/step.py": 1,
    "training/harness.py": 1,
    "training/task_facts.py": 1,
}
"""Writes of another kind, by their number: into a folder that was made for them a moment ago, to /proc, to
/dev/null or to a pipe."""
MODES = ("w", "wb", "a", "ab", "x", "xb", "w+b")


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
@pytest.mark.parametrize("name", WRITERS)
def test_no_link_in_a_files_place_is_written_through(tmp_path: Path, name: str, there: bool) -> None:
    """Its target is neither changed, cut nor made: the link is replaced, or an error raised."""
    run, target = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    (run / name.replace("PID", str(os.getpid()))).symlink_to(target)
    if there:
        target.write_text("precious", encoding="utf-8")
    with suppress(OSError, BudgetsearchError):
        WRITERS[name](run)
    assert ("precious" if there else None) == (target.read_text() if target.exists() else None)


@pytest.mark.parametrize("name", ["lock", "ledger.sqlite", "study.sqlite", "settings.json", "ray"])
def test_a_run_with_a_link_in_it_neither_starts_nor_goes_on(tmp_path: Path, name: str) -> None:
    """The error names the link."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").touch()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "elsewhere")
    for check in (RunFolder(run).check_free, RunFolder(run).check_no_links):
        with pytest.raises(RunFolderError, match=name):
            check()


def test_every_file_of_a_run_is_looked_at() -> None:
    """Also what SQLite keeps beside a database."""
    assert all(map(is_own, ["lock", "ledger.sqlite", "ledger.sqlite-wal", "study.sqlite-journal", "ray"]))
    assert not any(map(is_own, ["notes.sqlite", "lock-wal", "ledger.sqlite-wal.bak", ".ssh"]))


def writes(tree: ast.AST) -> Iterator[int]:
    """Lines on which a file is opened for writing by other means than ``storage.files``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = {value.value for value in ast.walk(node) if isinstance(value, ast.Constant)}
        makes = "O_CREAT" in {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
        opens = name in ("open", "fdopen") and (makes or not words.isdisjoint(MODES))
        if opens or name in ("write_text", "write_bytes", "copytree"):
            yield node.lineno


def test_nothing_else_in_the_package_opens_a_file_for_writing() -> None:
    """Whoever adds a write either takes ``storage.files`` for it or makes a folder for it first."""
    found = {
        str(path.relative_to(PACKAGE)): len(lines)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "files.py" and (lines := list(writes(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert FRESH == found


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022])
def test_files_get_the_permissions_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    """Whatever the tool writes: its folders too, which others on the machine could look into."""
    before = os.umask(umask)
    try:
        with fresh_folder(tmp_path / "checkpoint") as fresh:
            (fresh / "weights").write_bytes(b"w")
        replace_text(tmp_path / "report.md", "x")
        replace_file(tmp_path / "settings.json", b"x")
        RunLock(tmp_path).release()
        with locked(tmp_path / "cache"):
            pass
        Backup(tmp_path / "ledger.jsonl", [], Copy([])).close()
        Ledger(tmp_path / "ledger.sqlite").close()
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert 0 == mode & umask, f"{path.name}: {mode:o}"
    assert 0o777 & ~umask == stat.S_IMODE((tmp_path / "checkpoint").stat().st_mode)
