"""Shared fixtures: a tiny model, a tiny data set, and a cache of their own."""

from __future__ import annotations

import gc
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from budgetsearch.storage import ledger
from tests.support.rows import write_rows

if TYPE_CHECKING:
    from budgetsearch.core.records import WorkerSetup
    from budgetsearch.training.data.tokens import PreparedData
    from budgetsearch.training.members import Shop

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two tests run at a time: threads that wait for each other on the same cores would slow both tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hundreds of tests start processes: where bytecode may not be kept, each would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


ROOMS = Path(__file__).parent
PURE = ("core", "machine", "sampler")
"""Rooms whose tests start no process and load no model: the fast lane of ``make check``, but for those marked
``whole``, which play so much that a minute does not hold them."""


RUNS = (
    *("run/test_real_model.py", "run/test_end_to_end.py", "engines/test_ray.py", "docs/test_examples.py"),
    *("docs/test_readme.py", "run/test_recipe_runs.py"),
)
"""Whole runs with a budget in seconds: they begin first, and one process has them all, so that they do not
take each other's time (``--dist loadfile --no-loadscope-reorder``)."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file goes to one process, and so do all files of whole runs."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):  # type: ignore[misc]  # xdist is untyped here
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "runs" if file.removeprefix("tests/") in RUNS else file

    return Files(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with its room, and with ``pure`` where that is one of the fast lane; leave the slow ones
    out unless they are asked for."""
    if "slow" not in config.option.markexpr:
        items[:] = [item for item in items if item.get_closest_marker("slow") is None]
    files = {item: item.path.relative_to(ROOMS).as_posix() for item in items}
    items.sort(key=lambda item: RUNS.index(files[item]) if files[item] in RUNS else len(RUNS))
    for item in items:
        room = item.path.relative_to(ROOMS).parts[0]
        item.add_marker(room)
        if room in PURE and item.get_closest_marker("whole") is None:
            item.add_marker("pure")


def pytest_collection_finish() -> None:
    """What was imported stays: whoever frees memory need not look through a million objects of torch's for
    garbage, which takes half a second each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist tells its workers a width; what is piped here is as wide as for everybody."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True, scope="session")
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """No test cuts the power: in this process a ledger need not reach the disk with every entry."""

    def hurried(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    connect = ledger.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "connect", hurried)
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a byte tokenizer."""
    from tests.support.tiny import make_tiny_model

    made = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    gc.freeze()  # transformers has come
    return made


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty rows of JSONL."""
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that all tests share, apart from the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def prepared(tiny_model: Path, rows_file: Path, session_cache: Path) -> PreparedData:
    """The tokenized rows."""
    from budgetsearch.training.data.tokens import Sources, prepare

    return prepare(tiny_model, Sources(str(rows_file)), max_length=128, cache=session_cache)


@pytest.fixture
def shop(prepared: PreparedData, tiny_model: Path, tmp_path: Path) -> Shop:
    """What segments share, with checkpoints in a folder of the test's own."""
    from budgetsearch.training.members import Shop

    return Shop(
        data=prepared,
        model_path=tiny_model,
        checkpoint_path=tmp_path,
        device="cpu",
        targets="all-linear",
        base_name=str(tiny_model),
        seed=0,
        pad=0,
        beat=lambda trial, activity, tokens, loss: None,
        stopping=lambda: False,
        peak_bytes=lambda: 1,
    )


@pytest.fixture(scope="module")
def setup(
    tiny_model: Path, rows_file: Path, session_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> WorkerSetup:
    """A worker's setup with the tiny model."""
    from budgetsearch.core.records import WorkerSetup
    from budgetsearch.training.data.tokens import Sources, prepare

    data = prepare(tiny_model, Sources(str(rows_file)), max_length=128, cache=session_cache)
    return WorkerSetup(
        model_path=str(tiny_model),
        model_name=str(tiny_model),
        data_path=str(data.folder),
        checkpoint_path=str(tmp_path_factory.mktemp("checkpoints")),
        device="cpu",
        targets="all-linear",
        seed=0,
    )
