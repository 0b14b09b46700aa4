"""Passwords stay out of everything that is shown or written for others.

A URL is taken apart where it is known to be one. In other texts the passwords that were met in URLs are
looked for, and what looks like one more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"
WORDS = ("password", "passwd", "pwd", "passfile", "secret", "token")
"""In the name of what is a secret in a URL's query."""
APART = re.compile(r"(\s+|['\"])")
"""What ends a URL inside of a text."""
MAX_CHARACTERS = 20_000
"""A longer text loses its middle: an error that holds a whole file tells no more than its ends."""
_met: set[str] = set()


def remember(password: str) -> None:
    """Hide this password from now on, in every text of this process and however it is spelled there."""
    if len(password) > 2:  # a shorter one would hide syllables, and is none
        _met.update({password, quote(password, safe=""), quote_plus(password), repr(password)[1:-1]})


def without_secrets(text: str) -> str:
    """The text with every password in it replaced, and without its middle if it is very long."""
    for password in sorted(_met, key=len, reverse=True):
        text = text.replace(password, HIDDEN)
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        # No half of a URL stays, whose other half would tell what is a password in it.
        head, tail = re.sub(r"\S*\Z", "", text[:half]), re.sub(r"\A\S*", "", text[-half:])
        text = f"{head}[{len(text) - len(head) - len(tail)} characters are left out]{tail}"
    return "".join(map(shown_url, APART.split(text)))


def shown_url(url: str) -> str:
    """A URL without its passwords, whatever characters they have, or a word that may be none.

    ``user:password@`` ends at the last ``@``: somebody may not have escaped another one.
    """
    if password := password_in(url):
        url = url.replace(f":{password}@", f":{HIDDEN}@", 1)
    return "".join(map(_shown_part, re.split(r"([?&])", url))) if "=" in url else url


def password_in(url: str) -> str:
    """What stands for a password before the host, as it is written there; nothing if there is none."""
    _, there, rest = url.partition("://")
    user, _, behind = (rest if there else url).partition(":")
    return "" if set(user) & set("/@") else behind.rpartition("@")[0]


def _shown_part(part: str) -> str:
    name, is_set, value = part.partition("=")
    while is_set and value and not any(word in name.lower() for word in WORDS):
        more, is_set, value = value.partition("=")
        name = f"{name}={more}"
    return f"{name}={HIDDEN}" if is_set and value else part


def shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as others may see them."""
    return {
        name: shown_url(value) if name in ("storage", "shared") and isinstance(value, str) else value
        for name, value in settings.items()
    }
