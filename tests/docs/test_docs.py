"""The documentation builds, its links lead somewhere, and its snippets are what the program takes."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from budgetsearch.cli import app
from budgetsearch.run.settings import settings_table
from budgetsearch.run.spaces import load_space

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LISTED = (*PAGES, ROOT / "README.md")


def blocks(*languages: str) -> Iterator[tuple[str, str]]:
    """(page, text) of every code block in one of these languages."""
    for path in LISTED:
        text = path.read_text(encoding="utf-8")
        for language, body in re.findall(r"^ *```(\w+)\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE):
            if language in languages:
                yield path.name, body


def command_lines() -> list[tuple[str, str]]:
    """(page, line) of every ``budgetsearch`` command in a shell block, joined over its backslashes."""
    found = []
    for page, body in blocks("bash", "sh", "console"):
        for line in re.sub(r"\\\n\s*", " ", body).splitlines():
            line = re.sub(r"^\$ |^srun |^exec ", "", line.strip())
            if line.startswith("budgetsearch "):
                found.append((page, line))
    return found


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    """Strictly: a page that is not in the menu, a dead link and a dead anchor are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    done = subprocess.run(
        [*command, str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()


def test_there_are_commands_to_check() -> None:
    """So that the next test cannot pass for want of any."""
    assert len(command_lines()) > 20


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_every_command_of_the_documentation_is_one_that_the_program_takes(page: str, line: str) -> None:
    """Command, options and values parse; nothing is run."""
    arguments = [a for a in shlex.split(line, comments=True)[1:] if a not in ("...", "\u2026")]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if arguments[0].startswith("-"):
        assert arguments[0] in {"--help", "--version"}
        return
    command = commands.get(arguments[0])
    assert command is not None, f"{page}: there is no command {arguments[0]}"
    if "--help" not in arguments:
        command.make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize(("page", "code"), list(blocks("python")))
def test_every_python_snippet_compiles_and_its_imports_exist(page: str, code: str) -> None:
    """Names are imported from where the snippet says."""
    for node in ast.walk(ast.parse(code, filename=page)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), f"{page}: {node.module}"


@pytest.mark.parametrize(("page", "text"), list(blocks("yaml", "json")))
def test_every_data_snippet_can_be_read(page: str, text: str, tmp_path: Path) -> None:
    """JSON lines and YAML; what has dimensions is a search space."""
    if text.lstrip().startswith(("{", "[")):
        json.loads(text)
        return
    content = yaml.safe_load(text)
    if isinstance(content, dict) and "dimensions" in content:
        path = tmp_path / "space.yaml"
        path.write_text(text, encoding="utf-8")
        assert load_space(str(path)).searched


def test_the_table_of_settings_is_that_of_the_program() -> None:
    """Names, values, defaults and texts stand in the fields; ``make docs`` writes the table again."""
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert settings_table() == page[page.index("| setting |") :]
