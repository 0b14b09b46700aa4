"""The run's files as artifacts of its study, without a copy: an artifact is a link to the file.

An adapter can be large, and it is replaced while the run goes; a link costs nothing and leads to what stands
there now. Optuna's own store reads such links like files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from budgetsearch.core.history.history import History

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "budgetsearch.json")
REPORTS = ("report.md", "report.html")


class Store(Protocol):
    """Keeper of links."""

    def link(self, artifact_id: str, target: Path) -> None:
        """Let the artifact be the file at ``target``, whatever it holds when it is read."""
        ...


def files_of(run: Path, history: History) -> Iterator[Path]:
    """Files of the run that are worth showing: those that are there, and the report that the end writes."""
    for path in [*(run / "adapter" / name for name in ADAPTER_FILES), *(run / name for name in REPORTS)]:
        if path.is_file() or (path.name == REPORTS[0] and _reported(history)):
            yield path


def _reported(history: History) -> bool:
    """Tell whether the run is about to write its report, or has."""
    return history.closed is not None and history.closed.state != "failed"


def attached(study: Any) -> set[str]:
    """Names of the files that the study has already."""
    from optuna.artifacts import get_all_artifact_meta

    return {meta.filename for meta in get_all_artifact_meta(study)}


def attach(study: Any, store: Store, path: Path) -> None:
    """Make the file an artifact of the study."""
    from optuna.artifacts import upload_artifact

    with tempfile.TemporaryDirectory() as folder:
        shown = path
        if not path.exists():  # Optuna opens what is uploaded
            shown = Path(folder) / path.name
            shown.touch()
        upload_artifact(artifact_store=_Towards(store, path), file_path=str(shown), study_or_trial=study)


class _Towards:
    """Optuna's idea of a store, for one upload: instead of the content it keeps where the file is."""

    def __init__(self, store: Store, target: Path) -> None:
        self._store, self._target = store, target

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self._store.link(artifact_id, self._target)


class FolderLinks:
    """Links in a folder, relative so that the run's folder can be moved.

    ``optuna-dashboard STORAGE --artifact-dir FOLDER`` reads them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def link(self, artifact_id: str, target: Path) -> None:
        """See ``Store``."""
        (self._folder / artifact_id).symlink_to(os.path.relpath(target, self._folder))


class MemoryLinks:
    """Links that are gone with the process; a store for reading only, as optuna-dashboard takes it."""

    def __init__(self) -> None:
        self._targets: dict[str, Path] = {}

    def link(self, artifact_id: str, target: Path) -> None:
        """See ``Store``."""
        self._targets[artifact_id] = target

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The file as it stands now.

        Raises:
            ArtifactNotFound: the file is gone.
        """
        from optuna.artifacts.exceptions import ArtifactNotFound

        try:
            return self._targets[artifact_id].open("rb")
        except (KeyError, OSError) as error:
            raise ArtifactNotFound(f"artifact {artifact_id} is not there any more") from error

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Nobody uploads through the dashboard into a run.

        Raises:
            PermissionError: always.
        """
        raise PermissionError("the files of a run are for reading only")

    def remove(self, artifact_id: str) -> None:
        """Forget the link; the file stays."""
        self._targets.pop(artifact_id, None)
