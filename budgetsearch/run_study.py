"""The Optuna study of a run: where it is stored, and what writes the ledger's events into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from budgetsearch.core.events import Opened
from budgetsearch.runfolder import RunFolder

if TYPE_CHECKING:
    from budgetsearch.study.mirror import StudyMirror


def mirror_of(storage: str | None, folder: RunFolder, opened: Opened) -> StudyMirror:
    """What writes a run's events into its study. ``storage``: a URL with its password, if one was given."""
    from budgetsearch.study.mirror import StudyMirror
    from budgetsearch.study.showcase import Showcase

    own = None if storage else folder.study
    showcase = Showcase(folder.path.absolute())
    return StudyMirror(storage_url(storage, folder), str(opened.facts["study"]), own, showcase=showcase)


def storage_url(given: str | None, folder: RunFolder) -> str:
    """The Optuna storage of a run: what ``--storage`` says, else SQLite in its folder."""
    # Optuna fills in what stands in braces.
    return given or f"sqlite:///{folder.study}".replace("{", "{{").replace("}", "}}")


def anchored_storage(url: str | None) -> str | None:
    """The same storage with an absolute path."""
    prefix, _, path = (url or "").partition("sqlite:///")
    return f"sqlite:///{Path(path).expanduser().absolute()}" if path and not prefix else url


def resumed_storage(opened: Opened, given: str | None) -> str | None:
    """The Optuna storage of a run that goes on; ``given``: its URL again, with its password.

    Raises:
        SettingsError: the URL cannot be used, or its password is missing.
    """
    from budgetsearch.study.storage import of_resumed

    written = opened.settings.get("storage")
    if not written:
        return None  # its study lies in its folder
    return of_resumed(str(written), anchored_storage(given), bool(opened.facts.get("storage_password")))
