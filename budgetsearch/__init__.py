"""The best LoRA adapter that one GPU and a fixed time can buy.

>>> import budgetsearch as bs
>>> result = bs.run(model="my-model", data="train.jsonl", gpu="cpu", hours=0.5)  # doctest: +SKIP
>>> result.best.params, result.best.loss, result.adapter_path  # doctest: +SKIP
"""

from importlib.metadata import version as _version

from budgetsearch.api import plan, report, reproduce, resume, run, status, verify
from budgetsearch.core.errors import (
    BudgetError,
    BudgetsearchError,
    DataError,
    DeviceError,
    EngineError,
    ModelError,
    RunFolderError,
    SettingsError,
    SpaceError,
    UsageError,
)
from budgetsearch.run.result import Best, Result

__version__ = _version("budgetsearch")

__all__ = [
    "Best",
    "BudgetError",
    "BudgetsearchError",
    "DataError",
    "DeviceError",
    "EngineError",
    "ModelError",
    "Result",
    "RunFolderError",
    "SettingsError",
    "SpaceError",
    "UsageError",
    "plan",
    "report",
    "reproduce",
    "resume",
    "run",
    "status",
    "verify",
]
