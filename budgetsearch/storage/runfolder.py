"""The folder of one run: where everything lies."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import BudgetsearchError, LedgerError, RunFolderError
from budgetsearch.core.secrets import shown_settings
from budgetsearch.storage.files import remove_empty, replace_file, replace_text, unwritable
from budgetsearch.storage.ledger import read_entries
from budgetsearch.storage.lock import RunLock, held, read_owner
from budgetsearch.storage.ownership import claim, give_back, is_unused
from budgetsearch.storage.repair import SIDECARS

OWN = (
    *("lock", "worker.log", "checkpoints", "settings.json", "versions.lock", "ledger.sqlite", "study.sqlite"),
    *(
        "ledger.jsonl",
        "ledger.snapshot",
        "traceback.log",
        "ray",
        "study.state",
        "preparing.txt",
        ".settings.json.new",
        ".versions.lock.new",
        ".ledger.jsonl.new",
    ),
)
"""What a run that was stopped before its first event may have left, and what SQLite keeps beside it."""
TEXTS = ("report", "ledger", "preparing")
"""Stems of what is written beside itself first, as ``.NAME.PROCESS.tmp``."""
MANIFEST_FILE = "budgetsearch.json"
"""In an exported adapter: where it comes from and how it is loaded."""
RAY_OWN = re.compile(r"ray\.log|worker-\d+\.log|lanes-[\w-]+")
"""What it may have left in Ray's folder."""


class _Inside:
    """A path inside a run folder, as an attribute of it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path
    ledger = _Inside("ledger.sqlite")
    """The append-only record: the truth."""
    backup = _Inside("ledger.jsonl")
    """The same once more, in a file that only grows."""
    study = _Inside("study.sqlite")
    """The Optuna study: a view of the ledger."""
    study_state = _Inside("study.state")
    """Whether the study had all that the ledger had, when somebody last looked."""
    preparing = _Inside("preparing.txt")
    """What is being done before the first event."""
    settings = _Inside("settings.json")
    """Every setting, defaults included; without passwords."""
    versions = _Inside("versions.lock")
    """Every installed package with its version."""
    checkpoints = _Inside("checkpoints")
    """The trials' checkpoints."""
    adapter = _Inside("adapter")
    """The exported PEFT adapter."""
    report = _Inside("report.md")
    """The report."""
    report_html = _Inside("report.html")
    """The report with figures, one page that needs no network."""
    report_json = _Inside("report.json")
    """The report's numbers, for programs."""
    worker_log = _Inside("worker.log")
    """What the worker process and its libraries printed."""
    ray = _Inside("ray")
    """What Ray Tune wrote: results, TensorBoard files, logs of the workers."""
    traceback = _Inside("traceback.log")
    """Where errors happened that nobody foresaw."""

    @property
    def command_word(self) -> str:
        """The path as a shell takes it: quoted where it must be."""
        return shlex.quote(str(self.path))

    def has_ledger(self) -> bool:
        """Whether the ledger is there, or its backup, from which it can be made again."""
        return self.ledger.is_file() or self.backup.is_file()

    def check_free(self) -> None:
        """Refuse a folder that a new run must not write into.

        Raises:
            RunFolderError: it is in use, holds a run already, or holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"--out {self.path} is a file. Name a folder that does not exist yet.")
        if not self.path.exists():
            self._check_writable()
            return
        self.check_not_in_use()
        if self.has_ledger() and self._has_begun():
            raise RunFolderError(
                f"--out {self.path} already holds a run. Go on with `budgetsearch resume "
                f"{self.command_word}`, or name another folder."
            )
        if strange := self._strange():
            raise RunFolderError(
                f"--out {self.path} is not empty and holds no run ({strange}). Name another folder."
            )

    def names(self) -> frozenset[str]:
        """Of all that is in the folder; none where it does not exist yet."""
        return frozenset(os.listdir(self.path)) if self.path.is_dir() else frozenset()

    def _strange(self) -> str:
        """The first thing that a run which never began has not left; nothing if there is none."""
        names = self.names()
        for name in sorted(names):
            path = self.path / name
            if not is_own(name) or "lock" not in names or path.is_symlink():
                return name
            if path.is_dir() and not (
                is_unused(path)
                if path == self.checkpoints
                else path == self.ray and all(map(RAY_OWN.fullmatch, os.listdir(path)))
            ):
                return f"{name}/"
        return ""

    def check_no_links(self) -> None:
        """Refuse to go on where a link would lead what is written to another place.

        Raises:
            RunFolderError: there is one.
        """
        for name in sorted(self.names()):
            if is_own(name) and name != self.checkpoints.name and (self.path / name).is_symlink():
                raise RunFolderError(
                    f"{self.path / name} is a link, and nothing is written where it leads: put the "
                    "file itself there."
                )

    def _has_begun(self) -> bool:
        """Whether the ledger holds an event, or may have held one."""
        try:
            return next(read_entries(self.ledger), None) is not None
        except LedgerError:
            return True

    def _check_writable(self) -> None:
        parent = next(p for p in self.path.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RunFolderError(
                f"--out {self.path} cannot be made: {parent} is not a folder you can write to."
            )

    def check_run(self) -> None:
        """Insist that there is a run in the folder.

        Raises:
            RunFolderError: there is none.
            LedgerError: there was one, but its ledger is gone.
        """
        if self.has_ledger():
            return
        if self.path.is_dir() and self.in_use():
            raise self.being_prepared()
        if self.has_earned():
            raise LedgerError(
                f"The ledger {self.ledger} is gone, and its backup {self.backup.name} too, but there "
                "are checkpoints or an adapter beside them. Restore one of the two files from a copy; the "
                "adapter can be used as it is."
            )
        if self.path.is_file():
            near = RunFolder(self.path.parent)
            hint = f"the run is {near.command_word}" if near.has_ledger() else "name the folder of a run"
            raise RunFolderError(f"{self.path} is a file, not a run: {hint}.")
        what = "has no ledger.sqlite, so it is not a run" if self.path.is_dir() else "does not exist"
        raise RunFolderError(f"{self.path} {what}. `budgetsearch run --out FOLDER` starts one.")

    def has_earned(self) -> bool:
        """Whether there is what only a search can have left."""
        return self.adapter.exists() or any(self.checkpoints.glob("trial*"))

    def holds_adapter(self, checkpoint: str | None) -> bool:
        """Whether an adapter is there that says that it was made from this checkpoint; after a failure or a
        damaged ledger it may be another one's, or somebody has moved it."""
        told = told_by(self.adapter)
        files = told.get("files", ["adapter_model.safetensors"])  # a recipe says what it hands out
        there = all(isinstance(name, str) and (self.adapter / name).is_file() for name in files)
        return checkpoint is not None and told.get("checkpoint") == checkpoint and there

    def note_study(self, level: bool, events: int) -> None:
        """Keep in mind whether the study has all of the ledger's so many events: to find out takes long, and
        of a database elsewhere nobody else can tell."""
        try:
            replace_file(self.study_state, json.dumps(self._study_stand(level, events)).encode())
        except OSError:
            pass  # a note that cannot be kept is no reason to end a run

    def study_is_behind(self) -> bool:
        """Whether the study is known to lack something."""
        return self._noted_of_study().get("level") is False

    def study_is_level(self, events: int) -> bool:
        """Whether the run's own study has been left alone since it had all of so many events."""
        stand = self._study_stand(True, events)
        return stand["file"] is not None and stand == self._noted_of_study()

    def _study_stand(self, level: bool, events: int) -> dict[str, Any]:
        found = self.study.stat() if self.study.is_file() else None
        file = None if found is None else [found.st_ino, found.st_size, found.st_mtime_ns]
        return {"level": level, "events": events, "file": file}

    def _noted_of_study(self) -> Mapping[str, Any]:
        try:
            found = read_json(self.study_state.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def reports_stand(self) -> bool:
        """Whether all reports are there, written after the ledger's last event."""
        try:
            last = self.ledger.stat().st_mtime_ns
            return all(
                p.stat().st_mtime_ns >= last for p in (self.report, self.report_json, self.report_html)
            )
        except OSError:
            return False

    def note_step(self, step: str) -> None:
        """Let others know what is being done before the first event."""
        try:
            replace_text(self.preparing, step)
        except OSError:
            pass  # whoever cannot be told waits

    def being_prepared(self) -> RunFolderError:
        """What to say of a run that has not begun yet."""
        try:
            owner = read_owner((self.path / "lock").read_text(encoding="utf-8", errors="replace"))
        except OSError:
            owner = None
        by = f" by {owner}" if owner is not None else ""
        try:
            step = self.preparing.read_text(encoding="utf-8", errors="replace")[:200]
        except OSError:
            step = "it has just begun"
        return RunFolderError(f"{self.path} is still being prepared{by} ({step}). Try again in a moment.")

    def never_began(self) -> BudgetsearchError:
        """What a ledger without an event means: beside what only a search can have left it has lost them."""
        if self.has_earned():
            return LedgerError(
                f"The ledger {self.ledger} holds no event, but there are checkpoints or an adapter beside "
                "it. Restore it from a copy; the adapter can be used as it is."
            )
        return RunFolderError(
            f"{self.path} was stopped before it began, so there is nothing to go on with. Start it "
            f"again with `budgetsearch run --out {self.command_word}` and its other options."
        )

    def in_use(self) -> bool:
        """Whether a process works on the run; nothing is written to find out."""
        return held(self.path / "lock", self.path)

    def goes(self, closed: bool) -> bool:
        """Whether a process works on the run in it; ``closed``: the ledger says that the run is over."""
        return not closed and self.in_use()

    def check_not_in_use(self) -> None:
        """Refuse a folder whose lock is held.

        Raises:
            RunFolderError: a process works on it.
        """
        if (self.path / "lock").exists():
            RunLock(self.path).release()

    def prepare(self, settings: dict[str, Any], owner: str) -> None:
        """Make what a run needs before its first event: folders, settings, versions.

        ``owner``: the run, as its ledger names it, for the sign in the folder of its checkpoints.

        Raises:
            RunFolderError: the disk is full, or something else keeps them from being written.
        """
        try:
            claim(self.checkpoints, owner)
            self.tidy()
            shown = json.dumps(shown_settings(settings), indent=2)
            replace_file(self.settings, f"{shown}\n".encode())
            self._write_versions()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def tidy(self) -> None:
        """Remove what a process left that died while it wrote a report, its settings or its study, and what
        it said of its preparation."""
        halves = (self.path / f".{path.name}.new" for path in (self.settings, self.versions))
        half_written = (f".{stem}.*.tmp" for stem in TEXTS)
        texts = (path for pattern in half_written for path in self.path.glob(pattern))
        study = (self.path / f"{self.study.name}.new{end}" for end in ("", *SIDECARS))
        for leftover in (*texts, *halves, *study, self.preparing):
            leftover.unlink(missing_ok=True)

    def _write_versions(self) -> None:
        """Write down the Python and every installed package: what a repetition needs."""
        if self.versions.exists() and self.versions.stat().st_size:
            return  # a resume: what the run began with is what counts
        found = {(d.metadata["Name"] or "?").lower(): d.version for d in importlib.metadata.distributions()}
        lines = [f"# Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
        lines += [f"{name}=={version}" for name, version in sorted(found.items())]
        replace_file(self.versions, ("\n".join(lines) + "\n").encode())

    def clear(self, before: Collection[str], *, remove: bool) -> None:
        """Take back what this process made for a run that never began; ``remove`` the folder as well, unless
        something else has come there. What was there ``before`` stays."""
        give_back(self.checkpoints)
        for _ in range(3):  # the study has a thread of its own, which may still be writing
            self._remove_own(self.names() - set(before))
        if remove:
            remove_empty(self.path)

    def _remove_own(self, names: Iterable[str]) -> None:
        for name in filter(is_own, names):
            path = self.path / name
            if path == self.ray and not path.is_symlink():
                for inner in filter(RAY_OWN.fullmatch, os.listdir(path)):
                    shutil.rmtree(path / inner) if (path / inner).is_dir() else (path / inner).unlink()
                remove_empty(path)
            elif not path.is_dir():
                path.unlink(missing_ok=True)


def told_by(adapter: Path) -> Mapping[str, Any]:
    """Read what an exported adapter itself says of where it comes from; nothing if that cannot be read.

    After a ledger lost its end, the adapter may come from an event that the ledger does not hold.
    """
    try:
        found = read_json((adapter / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_own(name: str) -> bool:
    """Whether a run makes something of this name before its first event, half-written texts included."""
    text = re.fullmatch(r"\.(.+)\.\d+\.tmp", name)
    return re.sub(r"(?<=\.sqlite)(\.new)?(-(wal|shm|journal))?$", "", text[1] if text else name) in OWN
