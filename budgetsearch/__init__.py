"""The best LoRA adapter that one GPU and a fixed time can buy.

>>> import budgetsearch as bs
>>> run = bs.run(model="my-model", data="train.jsonl", gpu="cpu", hours=0.5)  # doctest: +SKIP
>>> run.best.params, run.best.loss, run.adapter_path  # doctest: +SKIP
"""

from importlib.metadata import version as _version

from budgetsearch.api import (
    Places,
    Run,
    Tasks,
    Trials,
    compare,
    dashboard,
    doctor,
    inspect,
    list_runs,
    plan,
    report,
    reproduce,
    resume,
    run,
    simulate,
    status,
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
    LedgerError,
    ModelError,
    RunFolderError,
    SettingsError,
    SpaceError,
    UnreadableError,
    UntrustedCode,
    UsageError,
)
from budgetsearch.core.space.space import Space
from budgetsearch.run.result import Best

__version__ = _version("budgetsearch")

__all__ = [
    "Best",
    "BudgetError",
    "BudgetsearchError",
    "CheckpointError",
    "DataError",
    "DeviceError",
    "DiskError",
    "EngineError",
    "LedgerError",
    "ModelError",
    "Places",
    "Run",
    "RunFolderError",
    "SettingsError",
    "Space",
    "SpaceError",
    "Tasks",
    "Trials",
    "UnreadableError",
    "UntrustedCode",
    "UsageError",
    "compare",
    "dashboard",
    "doctor",
    "inspect",
    "list_runs",
    "open",
    "plan",
    "report",
    "reproduce",
    "resume",
    "run",
    "simulate",
    "status",
    "verify",
]
