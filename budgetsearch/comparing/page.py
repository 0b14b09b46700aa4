"""``compare.html`` and ``compare.json``: the comparison as files that need no network."""

from __future__ import annotations

import json
import os
from pathlib import Path

from budgetsearch.comparing.bootstrap import CONFIDENCE
from budgetsearch.comparing.comparison import CAVEATS, Comparison, as_json
from budgetsearch.comparing.plot import figure, unmeasured
from budgetsearch.comparing.table import apart_text, headings, measure_title, pair_rows, rows
from budgetsearch.core.errors import UsageError
from budgetsearch.report.tables import params_text

HTML, JSON = "compare.html", "compare.json"
TEMPLATE = Path(__file__).with_name("compare.html.j2")


def write(found: Comparison, folder: Path) -> list[Path]:
    """Write both files over older ones, each whole or not at all; returns their paths.

    Raises:
        UsageError: the folder cannot be written.
    """
    texts = {HTML: page(found), JSON: json.dumps(as_json(found), indent=2, allow_nan=False) + "\n"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            temporary.write_text(text, encoding="utf-8", errors="replace")
            os.replace(temporary, folder / name)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written ({error}); name another folder.") from error
    return [folder / name for name in texts]


def page(found: Comparison) -> str:
    """The whole page; everything that a run or a user named is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        found=found,
        apart=[apart_text(one) for one in found.apart],
        headings=headings(found),
        rows=rows(found),
        measures=[
            (measure_title(one, found), one.measure.notes, pair_rows(one))
            for one in found.compared
            if one.pairs
        ],
        confidence=f"{CONFIDENCE:.0%}",
        figure=_figure(found) if found.compared else "",
        unmeasured=unmeasured(found),
        notes=[*found.remarks, *CAVEATS],
        params=params_text,
    )


def _figure(found: Comparison) -> str:
    options = {"displaylogo": False, "responsive": True}
    return str(figure(found).to_html(full_html=False, include_plotlyjs=True, config=options))
