"""``compare.html`` and ``compare.json``: the comparison as files that need no network."""

from __future__ import annotations

import json
import os
from pathlib import Path

from budgetsearch.comparing.bootstrap import CONFIDENCE
from budgetsearch.comparing.comparison import CAVEATS, Comparison, as_json
from budgetsearch.comparing.table import apart_text, headings, measure_title, pair_rows, rows
from budgetsearch.core.errors import UsageError
from budgetsearch.report.tables import params_text

HTML, JSON = "compare.html", "compare.json"
TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs compared</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 1.5rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text, th.text { text-align: left; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid #888; }
.better { font-weight: 600; } .quiet { color: #666; } .apart { color: #a33; }
</style>
</head>
<body>
<h1>{{ found.runs | length }} {{ "run" if found.runs | length == 1 else "runs" }} compared</h1>
{% for line in apart %}<p class="apart">Not compared: {{ line }}.</p>{% endfor %}
{% if found.interrupted %}<p class="apart">The questions were interrupted: some answers are missing.</p>{% endif %}
<div class="scroll"><table>
<thead><tr><th></th>{% for name in headings %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for name, cells in rows %}
<tr><td>{{ name }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
<p class="quiet">In brackets and as bars: {{ confidence }} intervals. A base is the model without an adapter.</p>
{% if figure %}{{ figure | safe }}{% endif %}
{% for title, notes, pairs in measures %}
<h2>{{ title }}: paired differences</h2>
<div class="scroll"><table>
<thead><tr><th class="text">pair</th><th>difference</th><th>p (Holm)</th><th class="text">better</th></tr></thead>
<tbody>{% for pair in pairs %}
<tr><td>{{ pair[0] }}</td><td>{{ pair[1] }}</td><td>{{ pair[2] }}</td>
<td class="text {{ 'quiet' if pair[3] == 'not told apart' else 'better' }}">{{ pair[3] }}</td></tr>{% endfor %}
</tbody></table></div>
{% for note in notes %}<p class="quiet">{{ note }}</p>{% endfor %}
{% endfor %}
{% if found.winnings %}
<h2>Score as in the NeurIPS LLM Efficiency Challenge: geometric mean of win rates</h2>
<div class="scroll"><table>
<thead><tr><th></th>{% for name in found.winnings[0].rates %}<th>{{ name }}</th>{% endfor %}<th>mean win rate</th>
<th>score</th></tr></thead>
<tbody>{% for one in found.winnings %}
<tr><td>{{ one.name }}</td>{% for rate in one.rates.values() %}<td>{{ "%.3f" | format(rate) }}</td>{% endfor %}
<td>{{ "%.3f" | format(one.mean) }}</td><td>{{ "%.3f" | format(one.score) }}</td></tr>{% endfor %}
</tbody></table></div>
{% for line in found.warnings %}<p class="apart">{{ line }}</p>{% endfor %}
{% endif %}
<h2>The best configurations</h2>
<ul>{% for run in found.runs %}
<li>{{ run.name }}: {{ params(run.params) or "no adapter yet" }}; budget {{ "%.0f" | format(run.costs.budget_seconds) }}
s, {{ run.trials }} trials, {{ run.model }} on {{ run.costs.card }}, {{ run.path }}</li>{% endfor %}
</ul>
<h2>Notes</h2>
<ul>{% for line in notes %}<li>{{ line }}</li>{% endfor %}</ul>
</body>
</html>
"""


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

    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE)
    return template.render(
        found=found,
        apart=[apart_text(one) for one in found.apart],
        headings=headings(found),
        rows=rows(found),
        measures=[
            (measure_title(one, found), one.measure.notes, pair_rows(one)) for one in found.compared if one.pairs
        ],
        confidence=f"{CONFIDENCE:.0%}",
        figure=_figure(found) if found.compared else "",
        notes=[*found.notes, *CAVEATS],
        params=params_text,
    )


def _figure(found: Comparison) -> str:
    from budgetsearch.comparing.plot import figure

    options = {"displaylogo": False, "responsive": True}
    return str(figure(found).to_html(full_html=False, include_plotlyjs=True, config=options))
