"""The house as CONTRIBUTING tells it: rooms, layers, and functions that can be read at one glance."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "budgetsearch"
ROOMS = {"cli", "tools", "run", "engines", "training", "views", "sampler", "storage", "machine", "core"}
MOST_PARAMETERS = 8
MOST_LINES = {"budgetsearch/training/recipe.py": 600}
"""Of a file; of the others 400."""


def modules() -> Iterator[tuple[str, ast.Module, int]]:
    """Each module of the package: its path, its tree, its lines."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield path.relative_to(ROOT).as_posix(), ast.parse(text), text.count("\n")


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Each function of the package with the place where it stands."""
    for path, tree, _ in modules():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path}:{node.lineno} {node.name}", node


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a caller may give."""
    named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")])


def test_the_package_has_ten_rooms_and_the_tests_have_the_same() -> None:
    """Whoever looks for a thing finds its room by its name."""
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries - {"search_spaces"} == ROOMS | {"api", "__init__.py", "__main__.py", "py.typed"}
    assert {path.name for path in (ROOT / "tests").iterdir()} >= ROOMS


def test_the_layers_hold_and_no_room_has_a_circle() -> None:
    """Every contract in pyproject.toml is kept; the circles of core/ are among them.

    In a process of its own: import-linter silences the loggers of the one that it runs in.
    """
    program = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    done = subprocess.run([*program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr


def test_no_function_takes_more_than_eight_parameters() -> None:
    """What belongs together travels together."""
    assert [place for place, node in functions() if parameters(node) > MOST_PARAMETERS] == []


def test_functions_and_files_stay_short() -> None:
    """Nine functions of ten have fewer than 25 lines; no file has more than 400."""
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for _, node in functions()]
    assert statistics.quantiles(lengths, n=10)[-1] < 25
    assert [path for path, _, lines in modules() if lines > MOST_LINES.get(path, 400)] == []


def test_no_test_imports_from_another_test() -> None:
    """What several of them need lives in tests/support."""
    found = [
        f"{path.relative_to(ROOT)}: {node.module}"
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and ".test_" in f".{node.module}"
    ]
    assert found == []


def test_policy_driver_and_engines_know_no_kind_of_training() -> None:
    """They serve recipes of any kind: no word of LoRA stands there."""
    places = [*PACKAGE.glob("core/policy/*.py"), PACKAGE / "run/driver.py", *PACKAGE.glob("engines/**/*.py")]
    assert [] == [path.name for path in places if "lora" in path.read_text(encoding="utf-8").lower()]
