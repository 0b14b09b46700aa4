"""The table of docs/models.md, written from the families: ``python -m tests.support.models_page``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from budgetsearch.training.anatomy import Anatomy, examine
from budgetsearch.training.targets import leaves
from tests.support.families import FAMILIES, build

PAGE = Path(__file__).parents[2] / "docs/models.md"
KINDS = {
    "dense": "dense",
    "experts": "mixture of experts",
    "hybrid": "hybrid or recurrent",
    "wrapper": "also sees",
}
HEAD = ("family", "kind", "adapters on", "share", "nf4 and int8")
FAILS_LATER = {"mamba": "no: its own code multiplies by weights that are packed then"}
"""What no look at the modules tells, and the first use does."""


def row_of(name: str, found: Anatomy) -> str:
    """A family's line of the table."""
    share = f"{found.covered / max(1, found.linear + found.experts):.0%}"
    packed = "no" if "nf4" in found.refused else "yes, int8 without experts" if found.experts else "yes"
    cells = (
        name,
        KINDS[FAMILIES[name].kind],
        ", ".join(f"`{leaf}`" for leaf in leaves(found.targets.names).split(", ")),
        share,
        FAILS_LATER.get(name, packed),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the table anew, from its head to the end of the page."""
    text = PAGE.read_text(encoding="utf-8")
    head = f"| {' | '.join(HEAD)} |\n"
    lines = [head, "|---" * len(HEAD) + "|\n"]
    with tempfile.TemporaryDirectory() as scratch:
        for name in FAMILIES:
            lines.append(row_of(name, examine(build(name, Path(scratch) / name))) + "\n")
    PAGE.write_text(text.split(head)[0] + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
