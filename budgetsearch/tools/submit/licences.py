"""Whether base and data may be handed on: what their own files say, and what nobody said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from budgetsearch.core.errors import UsageError

OPEN = frozenset(
    {
        *("apache-2.0", "mit", "isc", "bsd", "bsd-2-clause", "bsd-3-clause", "unlicense", "cc0-1.0"),
        *("cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-2.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
        *("odc-by", "odbl", "pddl", "cdla-permissive-1.0", "cdla-permissive-2.0", "llama2"),
    }
)
"""The Hub's names of licences under which work is passed on, also by those who earn with it; and Llama 2's,
which the challenge took."""
OTHER_NAMES: Mapping[str, str] = {"apache-2": "apache-2.0", "apache2": "apache-2.0", "llama-2": "llama2"}


@dataclass(frozen=True)
class Licence:
    """Of the base model or of a data source."""

    what: str
    said: str | None
    """As its files name it; None: they do not."""

    @property
    def is_open(self) -> bool:
        """Whether it is known to be open."""
        return self.said is not None and plain(self.said) in OPEN

    @property
    def line(self) -> str:
        """For people."""
        if self.said is None:
            return f"{self.what}: not stated with the files"
        return f"{self.what}: {self.said}" + ("" if self.is_open else ", which is not known to be open")


def plain(said: str) -> str:
    """A licence's name as the Hub writes it: ``Apache License, Version 2.0`` is ``apache-2.0``."""
    words = re.sub(r"\b(the|licen[cs]e|version)\b|[,()]", " ", said.lower())
    name = "-".join(re.sub(r"\bv(?=\d)", "", words).split())
    return OTHER_NAMES.get(name, name)


def licences_of(model: Mapping[str, object], data: Mapping[str, object]) -> tuple[Licence, ...]:
    """Of base and data; ``model`` and ``data``: the facts that the run wrote down of them."""
    source = str(model.get("source"))
    named = Path(source).name if Path(source).is_absolute() else source  # nobody's home stands in the folder
    base = Licence(f"base model {named}", _text(model.get("licence")))
    told = data.get("licences")
    sources = told if isinstance(told, Mapping) else {}
    return (base, *(Licence(f"data {source}", _text(said)) for source, said in sources.items()))


def check_licences(found: Sequence[Licence], *, checked: bool) -> None:
    """Insist on open licences, unless the user says to have looked at the others.

    Raises:
        UsageError: one is not known to be open; it is named.
    """
    if closed := [licence.line for licence in found if not licence.is_open and not checked]:
        lines = "\n".join(f"  {line}" for line in closed)
        raise UsageError(
            f"Not everything is known to be free to hand in:\n{lines}\nLook at the terms. If they allow it, "
            "say that you did with --licences-checked; the README then says so too."
        )


def _text(value: object) -> str | None:
    return str(value) if value else None
