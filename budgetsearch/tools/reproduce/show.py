"""A reproduction and a verification as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from budgetsearch.tools.reproduce.compare import Row
from budgetsearch.tools.reproduce.replay import Reproduced
from budgetsearch.tools.reproduce.verify import Verified
from budgetsearch.views.fitted import table_of

VERDICTS = {True: "yes", False: "NO", None: "-"}


def show_reproduced(outcome: Reproduced) -> RenderableType:
    """The table, why something may differ, and the verdict."""
    if outcome.agrees:
        verdict = "reproduced to the bit" if outcome.exact else "reproduced within the tolerance"
    else:
        verdict = "NOT reproduced: it differs beyond the tolerance"
    kept = [Text(f"adapter  {outcome.out}")] if outcome.out else []
    return Group(_table(outcome.rows), *_reasons(outcome.reasons), Text(verdict), *kept)


def show_verified(outcome: Verified) -> RenderableType:
    """What changed, the scores again, and the verdict."""
    known = [finding for finding in outcome.findings if finding.state != "noted"]
    lines = [Text(finding.line) for finding in outcome.findings if finding.state != "unchanged"]
    same = sum(finding.state == "unchanged" for finding in known)
    lines.append(Text(f"{same} of {len(known)} unchanged"))
    parts: list[RenderableType] = [_table(outcome.rows)] if outcome.rows else []
    verdict = "verified" if outcome.passes else "NOT verified"
    return Group(*lines, *parts, *_reasons(outcome.reasons), Text(verdict))


def _table(rows: Iterable[Row]) -> Table:
    heads = ("", "then", "now", "difference", "tolerance", "agrees")
    cells = [
        (row.what, row.expected, row.found, row.difference, row.tolerance, VERDICTS[row.agrees])
        for row in rows
    ]
    return table_of("", heads, cells, left=heads)


def _reasons(reasons: Sequence[str]) -> list[Text]:
    """Why something may differ, if anything."""
    return [Text("may differ because of:"), *(Text(f"  {reason}") for reason in reasons)] if reasons else []
