"""What the user should know of a plan before it is carried out."""

from __future__ import annotations

from collections.abc import Iterator

from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.planning import SINGLE
from budgetsearch.core.policy.request import PlanRequest

FEW_ROWS = 8
"""With fewer validation rows a difference of two losses says next to nothing, and has no interval."""
FEW_ROWS_MEAN = (
    "Validation rows: {}. So few hardly tell which configuration is better, nor how good the adapter is. "
    "Give more data, a larger --valid-share, or --valid."
)

UNGRADED = (
    "The loss decides alone: enough answers for {} to say anything would take too much of the time, or none "
    "can be generated. Give more --hours, shorter answers, or a metric that takes less time."
)


def told_at_start(plan: Plan, request: PlanRequest) -> Iterator[str]:
    """Each in a sentence or two."""
    if plan.single:
        yield SINGLE.replace("was", "is")
    if request.valid_rows < FEW_ROWS and not request.whole_evaluation:
        yield FEW_ROWS_MEAN.format(request.valid_rows)
    if plan.metric is not None and not plan.metric_answers:
        yield UNGRADED.format(plan.metric.name)
