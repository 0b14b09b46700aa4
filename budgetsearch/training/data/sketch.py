"""A small program that renders a chat template twice, for ``frame``: run by its path, so that nothing but
Jinja is imported, within limits that the kernel keeps, for a template is a stranger's program.

Its input is a JSON object with ``template`` and ``values``, its output the texts of one and of two exchanges.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

SECONDS = 1
MOST_BYTES = 1 << 30
MOST_CHARACTERS = 1 << 20
"""Of a frame: longer than that is none."""
SAID = "budgetsearchsays"


def refuse(message: str) -> NoReturn:
    """What templates call for a conversation that they do not take."""
    raise ValueError(message)


def exchanges(count: int, parts: bool) -> list[dict[str, Any]]:
    """So many questions with their answers."""
    said: Any = [{"type": "text", "text": SAID}] if parts else SAID
    return [{"role": role, "content": said} for _ in range(count) for role in ("user", "assistant")]


def rendered(template: str, values: dict[str, Any]) -> list[str]:
    """One and two exchanges as texts, their contents as lists of parts where it takes them so alone."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=refuse, strftime_now=datetime(2024, 7, 26).strftime)
    compiled = environment.from_string(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
    for parts in (False, True):
        texts = [compiled.render(messages=exchanges(count, parts), **values) for count in (1, 2)]
        if [text.count(SAID) for text in texts] == [2, 4]:
            return texts
    return []


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    task = json.load(sys.stdin)
    texts = rendered(task["template"], task["values"])
    json.dump(texts if sum(map(len, texts)) < MOST_CHARACTERS else [], sys.stdout)
