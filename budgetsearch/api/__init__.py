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
    check,
    compare,
    dashboard,
    doctor,
    export,
    inspect,
    plan,
    reproduce,
    serve,
    simulate,
    submit,
    unpack,
    verify,
)
from budgetsearch.run.permissions import Places
from budgetsearch.tools.compare.tasks import Tasks
from budgetsearch.tools.export.wanted import Wanted
from budgetsearch.tools.serve.command import Serving
from budgetsearch.tools.submit.entry import Submitting

__all__ = [
    "Places",
    "Run",
    "Serving",
    "Submitting",
    "Tasks",
    "Trials",
    "Wanted",
    "check",
    "compare",
    "dashboard",
    "doctor",
    "export",
    "inspect",
    "list_runs",
    "open_history",
    "open_run",
    "plan",
    "report",
    "reproduce",
    "resume",
    "run",
    "serve",
    "simulate",
    "status",
    "submit",
    "unpack",
    "verify",
]
