"""Pages that show figures without a network: plotly.js inside, and a policy that lets nothing else run.

The policy names the hashes of the page's own scripts, so a name that slipped through the escaping would still
run nothing, and nothing can be fetched or sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

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
