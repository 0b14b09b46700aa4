"""Passwords stay out of everything that is shown or written for others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
USER = re.compile(r"((?:^|//|\s|['\"])[^\s:/@'\"]*:)(?!//)[^\s'\"]+(?=@)")
"""``user:password@`` in a URL, up to the last ``@``: somebody may not have escaped another one."""
WORD = re.compile(r"(\b\w*(?:password|passwd|pwd|passfile|secret|token)\w*=)[^&\s'\"]+", re.IGNORECASE)
"""... or in its query."""


def without_secrets(text: str) -> str:
    """The text with every password of a URL in it replaced."""
    return WORD.sub(rf"\1{HIDDEN}", USER.sub(rf"\1{HIDDEN}", text))


def shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as others may see them."""
    return {
        name: without_secrets(value) if name in ("storage", "shared") and isinstance(value, str) else value
        for name, value in settings.items()
    }
