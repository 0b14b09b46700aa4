"""The README's snippets run as they stand, only with less time and a tiny model in budgetsearch.yaml."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from budgetsearch.run.configuration import load_settings
from budgetsearch.run.spaces import load_space
from tests.support.rows import write_rows

ROOT = Path(__file__).parents[2]
HOURS = "0.016"


def snippets(language: str) -> list[str]:
    """The code blocks of one language in the README, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with the reader's data, and settings that name the tiny model."""
    folder = tmp_path_factory.mktemp("reader")
    write_rows(folder / "train.jsonl", 200)
    settings = {"model": str(tiny_model), "space": "lora_small", "task_examples": 4, "max_length": 128}
    (folder / "budgetsearch.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def start(place: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """Start a program in the reader's folder."""
    environment = {**os.environ, "BUDGETSEARCH_CACHE": str(place / "cache")}
    return subprocess.Popen(
        arguments, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check_dashboard(place: Path, arguments: list[str]) -> None:
    """It serves the study until it is interrupted."""
    process = start(place, [*arguments, "--port", "18099"])
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen("http://127.0.0.1:18099/api/studies", timeout=5) as answer:
                    studies = json.load(answer)["study_summaries"]
                break
            except OSError:
                assert time.monotonic() < deadline, "the dashboard does not answer"
                time.sleep(0.3)
        assert [study["study_name"] for study in studies] == ["mine"]
    finally:
        process.kill()
        process.communicate()


def test_the_shell_commands_of_the_readme_work(place: Path) -> None:
    """Every ``budgetsearch`` line runs and exits with 0; the dashboard answers."""
    lines = [line for block in snippets("bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("budgetsearch")]
    expected = {"run", "status", "report", "dashboard", "spaces", "resume", "plan", "doctor"}
    assert expected <= {c[1] for c in commands}
    for command in commands:
        shorter = command[1] != "plan"  # which spends nothing
        arguments = [HOURS if shorter and command[i - 1] == "--hours" else a for i, a in enumerate(command)]
        arguments = [sys.executable, "-m", "budgetsearch", *arguments[1:]]
        if "a100" in arguments:
            continue  # needs the card
        if command[1] == "dashboard":
            check_dashboard(place, arguments)
            continue
        process = start(place, arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{command}\n{output}"


def test_the_python_snippet_of_the_readme_works(place: Path) -> None:
    """It needs no ``__main__`` guard, and prints the best loss and the adapter's folder."""
    (code,) = snippets("python")
    script = place / "snippet.py"
    script.write_text(re.sub(r"hours=[\d.]+", f"hours={HOURS}", code), encoding="utf-8")
    process = start(place, [sys.executable, str(script)])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "adapter" in output
    assert list(place.glob("runs/*/adapter/adapter_model.safetensors"))


def test_the_example_settings_are_valid(tmp_path: Path) -> None:
    """Every YAML in examples/ loads as settings, or as a search space."""
    files = sorted((ROOT / "examples").rglob("*.yaml"))
    assert files
    for path in files:
        if "dimensions" in yaml.safe_load(path.read_text(encoding="utf-8")):
            assert load_space(str(path)).searched
            continue
        settings = load_settings({"gpu": "cpu"}, path, cwd=tmp_path)
        assert settings.hours > 0


def test_every_link_of_the_readme_leads_somewhere() -> None:
    """Relative links in README and CONTRIBUTING name files that exist."""
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / target).exists(), f"{name}: {target}"
