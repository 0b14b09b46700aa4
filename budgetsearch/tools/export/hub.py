"""A folder onto the Hugging Face Hub, after what would be uploaded can be seen."""

from __future__ import annotations

from pathlib import Path

from budgetsearch.core.errors import BudgetsearchError, UsageError


def files_of(folder: Path) -> tuple[tuple[str, int], ...]:
    """(name, bytes) of what would be uploaded."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)


def check_hub(name: str, *, dry: bool) -> None:
    """Insist on a name that the Hub takes, and on a token unless nothing is sent.

    Raises:
        UsageError: one of them is missing.
    """
    import huggingface_hub

    try:
        huggingface_hub.utils.validate_repo_id(name)
    except ValueError as error:
        raise UsageError(f"--hub {name}: {error}") from error
    if not dry and not huggingface_hub.get_token():
        raise UsageError(
            f"--hub {name}: there is no token to push with. Run `hf auth login` or set HF_TOKEN; --dry-run "
            "names what would be uploaded without one."
        )


def push(folder: Path, name: str) -> str:
    """Upload a folder into a private repository, which is made if need be; returns its address.

    Raises:
        BudgetsearchError: the Hub cannot be reached, or refuses.
    """
    import huggingface_hub
    from huggingface_hub import errors

    hub = huggingface_hub.HfApi()
    try:
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="From budgetsearch export"
        )
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BudgetsearchError(f"{folder} could not be pushed to {name}: {said}") from error
    return str(address)
