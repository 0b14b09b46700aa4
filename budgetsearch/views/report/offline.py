"""Pages that show figures without a network: plotly.js inside, and a policy that lets nothing else run.

The policy names the hashes of the page's own scripts, so a name that slipped through the escaping would still
run nothing, and nothing can be fetched or sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from budgetsearch.views.drawing import Figure
from budgetsearch.views.intervals import CONFIDENCE

DRAW = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const options = {responsive: true, displayModeBar: false};
for (const [name, figure] of Object.entries(figures)) {
  const place = document.getElementById("figure-" + name);
  place.textContent = "";
  Plotly.newPlot(place, figure.data, figure.layout, options);
}
const each = (width) => {
  for (const name of Object.keys(figures)) {
    const place = document.getElementById("figure-" + name);
    if (width) Plotly.relayout(place, {width: width, autosize: false});
    else Plotly.relayout(place, {width: null, autosize: true});
  }
};
addEventListener("beforeprint", () => each(640));
addEventListener("afterprint", () => each(0));
"""
"""Figures have a width of their own in pixels: on paper they get one that fits."""


def page_of(
    template: Path, figures: Mapping[str, Figure], filters: Mapping[str, Callable[..., Any]], **values: Any
) -> str:
    """A page from its template; everything that a run or a user named is escaped.

    ``figures``: by the place in which they are drawn. ``values``: what else the template shows.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    library = plotly_library()
    drawable = {name: {"data": one.data, "layout": one.layout} for name, one in figures.items()}
    return environment.get_template(template.name).render(
        figures=figures,
        figure_json=script_json(drawable),
        plotly=library,
        draw=DRAW,
        policy=policy([library, DRAW]),
        confidence=f"{CONFIDENCE:.0%}",
        **values,
    )


def plotly_library() -> str:
    """plotly.js, whole."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(scripts: Sequence[str]) -> str:
    """The content of a ``Content-Security-Policy`` under which these scripts run and nothing else does."""
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
