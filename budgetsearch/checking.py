"""What is checked of a run's settings before anything is touched, and what they mean from any folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetsearch.core.errors import DataError, SettingsError, SpaceError
from budgetsearch.execution import check_execution
from budgetsearch.run_study import anchored_storage
from budgetsearch.shared import check_shared, own_place

if TYPE_CHECKING:
    from budgetsearch.settings import Settings


def check(settings: Settings) -> None:
    """Check everything that can be checked without fetching or writing anything.

    Raises:
        UsageError: the card, the model's source or another input cannot be used.
    """
    from budgetsearch.training.sources import check_source

    check_execution(settings)
    check_source(settings.model)
    check_inputs(settings)


def check_inputs(settings: Settings) -> None:
    """Check what needs neither the card nor the model, and no network.

    Raises:
        UsageError: the space, the targets, the data or the storage cannot be used.
    """
    from budgetsearch.spaces import load_space
    from budgetsearch.study.storage import check_url
    from budgetsearch.training.data import check_data

    space = load_space(settings.space)
    if space.extra:
        raise SpaceError(
            f"The search space {settings.space} has dimensions that training does not know: "
            f"{', '.join(space.extra)}. It knows quantization, rank, learning_rate, alpha and dropout."
        )
    if not all(name.strip() for name in settings.targets.split(",")):
        raise SettingsError(
            f"--targets {settings.targets!r} holds an empty name; write q_proj,v_proj or all-linear."
        )
    for source in filter(None, (settings.data, settings.valid)):
        try:
            check_data(source)
        except OSError as error:
            raise DataError(f"{source[:200]} cannot be read: {error.strerror or error}.") from error
    if settings.storage:
        check_url(settings.storage)
    if settings.shared:
        check_shared(settings.shared)


def anchored(settings: Settings) -> Settings:
    """The same settings with absolute paths, so that a resume works from any folder."""
    local: dict[str, Any] = {
        name: str(Path(source).expanduser().absolute())
        for name in ("model", "data", "valid", "space")
        if (source := getattr(settings, name)) and Path(source).expanduser().exists()
    }
    if not Path(settings.space).suffix:
        local.pop("space", None)  # a name that comes with the package
    local["storage"] = anchored_storage(settings.storage)
    if settings.shared:
        assert settings.out is not None
        local["shared"] = own_place(settings.shared, settings.out.name)
    return settings.model_copy(update=local)
