"""The best LoRA adapter that one GPU and a fixed time can buy.

>>> import budgetsearch as bs
>>> run = bs.run(model="my-model", data="train.jsonl", gpu="cpu", hours=0.5)  # doctest: +SKIP
>>> run.best.params, run.best.loss, run.adapter_path  # doctest: +SKIP
"""

from importlib.metadata import version as _version

from budgetsearch.api import (
    Places,
    Run,
    Serving,
    Submitting,
    Tasks,
    Trials,
    Wanted,
    check,
    compare,
    dashboard,
    doctor,
    export,
    inspect,
    list_runs,
    plan,
    report,
    reproduce,
    resume,
    run,
    serve,
    simulate,
    status,
    submit,
    unpack,
    verify,
)
from budgetsearch.api import open_run as open  # noqa: A004  # as of files: bs.open(path)
from budgetsearch.core.errors import (
    BudgetError,
    BudgetsearchError,
    CheckpointError,
    DataError,
    DeviceError,
    DiskError,
    EngineError,
    LateError,
    LedgerError,
    ModelError,
    RecipeError,
    RunFolderError,
    SettingsError,
    SpaceError,
    UnreadableError,
    UntrustedCode,
    UsageError,
)
from budgetsearch.core.space.space import Space
from budgetsearch.run.result import Best
from budgetsearch.training.recipes.objective import objective
from budgetsearch.training.recipes.protocol import Course, Recipe

__version__ = _version("budgetsearch")

__all__ = [
    "Best",
    "BudgetError",
    "BudgetsearchError",
    "CheckpointError",
    "Course",
    "DataError",
    "DeviceError",
    "DiskError",
    "EngineError",
    "LateError",
    "LedgerError",
    "ModelError",
    "Places",
    "Recipe",
    "RecipeError",
    "Run",
    "RunFolderError",
    "Serving",
    "SettingsError",
    "Space",
    "SpaceError",
    "Submitting",
    "Tasks",
    "Trials",
    "UnreadableError",
    "UntrustedCode",
    "UsageError",
    "Wanted",
    "check",
    "compare",
    "dashboard",
    "doctor",
    "export",
    "inspect",
    "list_runs",
    "objective",
    "open",
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
