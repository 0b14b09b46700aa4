"""The Python API; ``budgetsearch`` exports all of it."""

from budgetsearch.api.runs import (
    Run,
    Trials,
    list_runs,
    open_history,
    open_run,
    report,
    resume,
    run,
    status,
)
from budgetsearch.api.tools import (
    compare,
    dashboard,
    doctor,
    inspect,
    plan,
    reproduce,
    simulate,
    verify,
)
from budgetsearch.tools.compare.tasks import Tasks
from budgetsearch.tools.reproduce.inputs import Places

__all__ = [
    "Places",
    "Run",
    "Tasks",
    "Trials",
    "compare",
    "dashboard",
    "doctor",
    "inspect",
    "list_runs",
    "open_history",
    "open_run",
    "plan",
    "report",
    "reproduce",
    "resume",
    "run",
    "simulate",
    "status",
    "verify",
]
