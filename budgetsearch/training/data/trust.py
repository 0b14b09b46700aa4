"""Python code that comes with a base model: seen before any of it runs, and run only where it is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import UntrustedCode

NAMES_CODE = ("config.json", "tokenizer_config.json")
"""Files whose ``auto_map`` names classes that transformers takes from the model's own folder."""
FLAG = "--trust-remote-code"


def uses_code(path: Path) -> bool:
    """Whether transformers would run code of this folder if it were allowed to."""
    return any("auto_map" in _read(path / name) for name in NAMES_CODE)


def check_code(path: Path, trusted: bool) -> None:
    """Refuse early a model that cannot be loaded without its own code, unless the user trusts it.

    Raises:
        UntrustedCode: it cannot, and the user does not.
    """
    config = _read(path / "config.json")
    if trusted or "auto_map" not in config:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        raise UntrustedCode(
            f"{path} runs its own Python code to load (model type {config.get('model_type')!r}); "
            f"read that code, then allow it with {FLAG} (trust_remote_code)"
        )


def code_files(path: Path) -> list[Path]:
    """The code of a base model's folder, also in folders inside of it (``custom_generate/``)."""
    return sorted(path.rglob("*.py"))


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever loads it says what is wrong with it
    return value if isinstance(value, dict) else {}
