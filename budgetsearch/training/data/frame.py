"""What a chat template adds to a row, foreseen without a tokenizer: of short rows it is the most."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.machine import child
from budgetsearch.training.data import sketch
from budgetsearch.training.data.templates import NAMED, written

CHARACTERS_PER_TOKEN = 4.0
MARK = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]")
"""A token of the template's own, as most of them look."""
WAIT_SECONDS = 5.0
"""For the small program, on a busy machine."""
TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"


@dataclass(frozen=True)
class Frame:
    """Tokens that no row says."""

    row: float = 2.0
    """Of each row: what texts begin with."""
    exchange: float = 12.0
    """Of each question with its answer: heads and ends of both turns, as most templates have them."""


def tokens_of(text: str) -> float:
    """About so many tokens a text has."""
    marks = MARK.findall(text)
    return len(marks) + len(MARK.sub("", text)) / CHARACTERS_PER_TOKEN


@cache
def frame_of(folder: Path | None, given: str | None = None) -> Frame:
    """Of the model in a folder, by its own template or the one that is ``given`` in its place; where there is
    neither, what is usual."""
    template, values = _template(folder) if folder is not None else ("", {})
    if given is not None:
        template = "" if given in NAMED else written(given)
    texts = _rendered(template, values) if template else []
    if len(texts) != 2:
        return Frame()
    one, two = (tokens_of(text.replace(sketch.SAID, "")) for text in texts)
    return Frame(max(0.0, 2 * one - two), two - one)


def _template(folder: Path) -> tuple[str, dict[str, Any]]:
    """The chat template of a folder, and the tokens that it may name."""
    try:
        config = read_json((folder / CONFIG).read_text(encoding="utf-8"))
        named = folder / TEMPLATE
        template = named.read_text(encoding="utf-8") if named.is_file() else config.get("chat_template", "")
    except (OSError, ValueError, AttributeError):
        return "", {}
    if isinstance(template, list):  # several, by their names
        named_default = (one for one in template if isinstance(one, dict) and one.get("name") == "default")
        template = next(named_default, {}).get("template", "")
    tokens = {key: _text(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return str(template or ""), tokens


def _text(token: Any) -> str:
    return str(token.get("content", "") if isinstance(token, Mapping) else token or "")


def _rendered(template: str, values: Mapping[str, str]) -> list[str]:
    """By a process of its own, which the kernel ends when it takes too much."""
    try:
        done = subprocess.run(
            child.script(sketch.__file__),
            input=json.dumps({"template": template, "values": values}),
            capture_output=True, text=True, timeout=WAIT_SECONDS, check=False,
            env=child.environment(), cwd=child.NEUTRAL,
        )  # fmt: skip
        found = read_json(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return []
    return found if isinstance(found, list) else []
