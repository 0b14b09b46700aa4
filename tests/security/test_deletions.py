"""What a run removes: nothing but what it has made itself, whatever lies there and wherever a link leads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from budgetsearch import api
from budgetsearch.core.errors import CheckpointError, DataError, RunFolderError
from budgetsearch.engines.shared import PREFIX, Copies
from budgetsearch.run import session
from budgetsearch.run.export import AdapterExporter, SharedExporter
from budgetsearch.storage.checkpoint_store import CheckpointStore
from budgetsearch.storage.lock import RunLock
from budgetsearch.storage.ownership import claim, remove_checkpoints
from budgetsearch.storage.runfolder import RunFolder
from tests.support.factories import FACTS, MODEL, whole_run

FOREIGN = (
    "checkpoints/my-finetune/model.safetensors",
    "checkpoints/.cache/file",
    "checkpoints/trial0001/weights",
    "ray/other/results.json",
    "ray/ray.log.bak",
    "notes.txt",
    "adapter/adapter_model.safetensors",
    ".ssh/id_ed25519",
)
"""What a user may have in the folder that --out names; each by itself keeps a run from using it."""
OURS = (
    "lock",
    "settings.json",
    "worker.log",
    "ledger.sqlite",
    "ledger.sqlite-wal",
    "checkpoints",
    "ray/ray.log",
)
"""What a run that was killed before its first event leaves."""
ENDS = (DataError("too small"), KeyboardInterrupt())
"""How a preparation ends: refused, or stopped by Ctrl-C."""
CHECKPOINT = "trial0000-rung0-tokens1-attempt7"
"""A checkpoint of the story's that nothing needs."""
NAMES = (
    ".ssh",
    ".config",
    "trial",
    "trial0001",
    "trial-of-mine",
    f"{CHECKPOINT}.bak",
    f".{CHECKPOINT}",
    "notes",
)
"""What a sweep must leave, though it begins as a checkpoint does or with a dot."""


def put(folder: Path, names: tuple[str, ...]) -> None:
    """Files of these names; ``checkpoints`` alone is a folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name == "checkpoints" else path.touch()


def listing(folder: Path) -> list[str]:
    """Of all that is in it, by its path there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def start(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[BaseException], Path]:
    """Start a run in ``out`` that ends so in its preparation, with all files made that come before it."""
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))

    def begin(end: BaseException) -> Path:
        def search(begun: session.Session) -> None:
            folder = begun.folder
            claim(folder.checkpoints, "mine")
            put(folder.checkpoints, ("trial9000-rung0-tokens1-attempt0/state.json",))
            put(folder.path, ("settings.json", "versions.lock", "worker.log", "ledger.sqlite", "ray/ray.log"))
            put(folder.ray, ("lanes-1/result.json",))
            raise end

        monkeypatch.setattr(session, "search", search)
        with pytest.raises(type(end)):
            api.run(model=str(tiny_model), data=str(rows_file), gpu="cpu", hours=1.0, out=tmp_path / "out")
        return tmp_path / "out"

    return begin


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_something_else_in_it_is_refused_and_stays_as_it_is(
    start: Callable[[BaseException], Path], tmp_path: Path, name: str
) -> None:
    """At the start, before anything is written; also beside what an earlier run of ours left."""
    for ours in ((), OURS):
        out = tmp_path / "out"
        put(out, (name, *(own for own in ours if not (out / own).exists())))
        before = listing(out)
        with pytest.raises(RunFolderError, match="is not empty and holds no run"):
            RunFolder(out).check_free()
        start(RunFolderError("is not empty"))
        assert before == listing(out)


def test_a_text_that_was_half_written_when_a_process_died_stands_in_no_ones_way(tmp_path: Path) -> None:
    """Killed before the first event, a run begins anew in its folder; a stranger's text keeps it shut."""
    put(tmp_path, ("lock", ".preparing.txt.1614.tmp"))
    RunFolder(tmp_path).check_free()
    RunFolder(tmp_path).tidy()
    assert ["lock"] == sorted(path.name for path in tmp_path.iterdir())
    put(tmp_path, (".notes.txt.1614.tmp",))
    with pytest.raises(RunFolderError, match="notes"):
        RunFolder(tmp_path).check_free()


@pytest.mark.parametrize("name", ["settings.json", "checkpoints", "ray/ray.log"])
def test_a_folder_without_a_lock_is_not_a_runs(tmp_path: Path, name: str) -> None:
    """A user's own settings.json is not overwritten: a run makes its lock before all else."""
    put(tmp_path, (name,))
    with pytest.raises(RunFolderError, match="holds no run"):
        RunFolder(tmp_path).check_free()


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_a_run_that_never_began_leaves_nothing_of_its_own(
    start: Callable[[BaseException], Path], end: BaseException
) -> None:
    """A folder that it made is gone again."""
    assert not start(end).exists()


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_what_was_there_before_stays(
    start: Callable[[BaseException], Path], tmp_path: Path, end: BaseException
) -> None:
    """An empty folder of the user's, and what an earlier run left in it."""
    put(tmp_path / "out", ())
    (tmp_path / "out").mkdir()
    assert [] == listing(start(end))
    put(tmp_path / "out", ("lock", "worker.log"))
    assert ["lock", "worker.log"] == listing(start(end))


@pytest.mark.parametrize("name", FOREIGN)
def test_what_comes_there_meanwhile_stays(
    start: Callable[[BaseException], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A run that is refused removes what it made, and leaves the folder to whoever uses it too."""
    clear = RunFolder.clear

    def late(self: RunFolder, *given: Any, **more: Any) -> None:
        put(self.path, (name,))
        clear(self, *given, **more)

    monkeypatch.setattr(RunFolder, "clear", late)
    out = start(KeyboardInterrupt())
    assert [name] == [found for found in listing(out) if (out / found).is_file()]


# ------------------------------------------------------------------------------ sweeps


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Somebody's home: folders whose names begin as checkpoints do, and as hidden folders do."""
    home = tmp_path / "home"
    put(home, tuple(f"{name}/file" for name in NAMES))
    return home


def exporter(tmp_path: Path, checkpoints: Path, owner: str = "mine") -> AdapterExporter:
    """The exporter of a run whose checkpoints are said to be there."""
    return AdapterExporter(tmp_path / "run", checkpoints, MODEL, FACTS["data"], tmp_path, owner=owner)


SWEEPS: dict[str, Callable[[AdapterExporter], None]] = {
    "on one machine": lambda inner: inner.sweep(whole_run().history),
    "behind a URL": lambda inner: _shared(inner).sweep(whole_run().history),
    "everything": lambda inner: remove_checkpoints(inner.checkpoint_path, inner.owner, lambda name: True),
}


def _shared(exporter: AdapterExporter) -> SharedExporter:
    """The same of a run whose checkpoints lie behind a URL, where there are none."""
    import fsspec

    store = CheckpointStore("memory://nothing", fsspec.filesystem("memory"), "/nothing")
    return SharedExporter(**vars(exporter), store=store)


@pytest.mark.parametrize("sweep", SWEEPS.values(), ids=SWEEPS)
@pytest.mark.parametrize("way", ["link", "itself"])
def test_nothing_is_removed_in_a_folder_without_the_runs_sign(
    home: Path, tmp_path: Path, way: str, sweep: Callable[[AdapterExporter], None]
) -> None:
    """Not even what has the exact name of a checkpoint: it may be another run's."""
    put(home, (f"{CHECKPOINT}/state.json",))
    (tmp_path / "link").symlink_to(home)
    before = listing(home)
    sweep(exporter(tmp_path, home if way == "itself" else tmp_path / "link"))
    claim(home / "other", "another run")
    put(home / "other", (f"{CHECKPOINT}/state.json",))
    sweep(exporter(tmp_path, home / "other"))
    assert before == [name for name in listing(home) if not name.startswith("other")]
    assert (home / "other" / CHECKPOINT).is_dir()


@pytest.mark.parametrize("sweep", list(SWEEPS.values())[:2], ids=list(SWEEPS)[:2])
def test_a_sweep_takes_checkpoints_of_the_exact_form_alone(
    tmp_path: Path, sweep: Callable[[AdapterExporter], None]
) -> None:
    """In the run's own folder, also by way of a link to it; and never what is a link itself."""
    mine, outside = tmp_path / "mine", tmp_path / "outside"
    claim(mine, "mine")
    put(mine, (f"{CHECKPOINT}/state.json", *(f"{name}/file" for name in NAMES)))
    put(outside, ("kept",))
    (mine / "trial0001-rung0-tokens1-attempt7").symlink_to(outside)
    (tmp_path / "link").symlink_to(mine)
    before = listing(mine)
    sweep(exporter(tmp_path, tmp_path / "link"))
    assert [
        name for name in before if not name.startswith(f"{CHECKPOINT}/") and name != CHECKPOINT
    ] == listing(mine)
    assert ["kept"] == listing(outside)


@pytest.mark.parametrize("name", ["../../home", "/etc", "..", "", "trial0001", "trial0001-rung0/../../../x"])
def test_a_ledger_names_no_folder_outside_by_the_name_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    """Whatever a stranger's ledger says: what is no checkpoint's name is neither read nor replaced."""
    import dataclasses

    story = whole_run()
    best = story.history.incumbent
    assert best is not None
    best = dataclasses.replace(best, best_checkpoint=name, exported=None)
    claim(tmp_path / "copies", "mine")
    inner = exporter(tmp_path, tmp_path / "copies")
    for found in (inner, _shared(inner)):
        with pytest.raises(CheckpointError, match="is not the name of a checkpoint"):
            found.export(story.history, best, final=True)


@pytest.mark.parametrize("name", [f"{PREFIX}mine", f"{PREFIX}0123abcd/notes"])
def test_copies_of_dead_workers_are_told_from_folders_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By their exact name, and by having nothing else in them."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / name.partition("/")[0]
    put(tmp_path, (f"{folder.name}/lock", f"{name}/file" if "/" not in name else name))
    before = listing(folder)
    copies = Copies.make()
    os.close(copies.lock)
    assert before == listing(folder)


def test_a_run_goes_on_by_way_of_a_link_only_to_its_own_checkpoints(tmp_path: Path) -> None:
    """Moved to another disk they still carry its sign; anybody else's folder is refused."""
    folder = RunFolder(tmp_path)
    RunLock(tmp_path).release()
    folder.prepare({}, "mine")
    folder.checkpoints.rename(tmp_path / "scratch")
    folder.checkpoints.symlink_to(tmp_path / "scratch")
    folder.prepare({}, "mine")
    folder.checkpoints.unlink()
    (tmp_path / "empty").mkdir()
    folder.checkpoints.symlink_to(tmp_path / "empty")
    with pytest.raises(RunFolderError, match="does not carry this run's sign"):
        folder.prepare({}, "mine")
    assert [] == listing(tmp_path / "empty")
