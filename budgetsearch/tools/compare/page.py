"""``compare.html`` and ``compare.json``: the comparison as files that need no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import UsageError
from budgetsearch.storage.files import replace_text
from budgetsearch.tools.compare.comparison import CAVEATS, Compared, Comparison, as_json
from budgetsearch.tools.compare.plot import caption, legend, panels, unmeasured
from budgetsearch.tools.compare.table import apart_text, headings, measure_title, pair_rows, rows
from budgetsearch.views.report.offline import page_of
from budgetsearch.views.words import params_text

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
            replace_text(folder / name, text)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written ({error}); name another folder.") from error
    return [folder / name for name in texts]


def page(found: Comparison) -> str:
    """The whole page."""
    figures = {
        figure.name: figure
        for number, one in enumerate(found.compared)
        for figure in panels(one, found, number)
    }
    return page_of(
        TEMPLATE,
        figures,
        {},
        found=found,
        apart=[apart_text(one) for one in found.apart],
        headings=headings(found),
        rows=rows(found),
        measures=[_measure(one, found, number) for number, one in enumerate(found.compared)],
        legend=legend(found),
        unmeasured=unmeasured(found),
        notes=[*found.remarks, *CAVEATS],
        params=params_text,
    )


def _measure(one: Compared, found: Comparison, number: int) -> dict[str, Any]:
    return {
        "title": measure_title(one, found),
        "panels": panels(one, found, number),
        "caption": caption(one),
        "notes": one.measure.notes,
        "pairs": pair_rows(one),
    }
