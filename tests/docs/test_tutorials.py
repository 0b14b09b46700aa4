"""Each tutorial is gone through from its first line to its last, only with less time and a tiny model."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from budgetsearch.tools.compare.tasks import SCENARIOS
from tests.support.local_tasks import write_choice_task
from tests.support.rows import write_rows

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs").glob("tutorial-*.md"))
FOREIGN = ("docker", "ollama", "vllm", "cd", "--lora-modules")
"""What is not here; a page that names one says that its lines were not run."""
SHORTER: Mapping[str, str] = {"--hours": "0.05", "--gpu": "cpu", "--limit": "1", "--port": "0"}
"""Values of options in place of the page's."""
PORT = "8000"
"""On the pages; here any that is free."""
MORE: Mapping[str, Sequence[str]] = {
    "compare": ("--task-data", "tasks"),
    "submit": ("--copy-base",),
}
"""What a command gets beside its own: no network is used, and the tiny base lies on this machine."""


def steps(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of its blocks for the shell and for Python, in their order."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    yield from ((language, text) for language, text in blocks if language in ("bash", "sh", "python"))


def lines(text: str) -> list[str]:
    """Of a shell block, joined over its backslashes."""
    return [line for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]


def test_there_are_four_and_each_says_what_it_did_not_run() -> None:
    """All are in the menu; every line is this program's, or one of others that the page owns up to."""
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert 4 == len(TUTORIALS)
    for page in TUTORIALS:
        assert f": {page.name}" in menu
        text = page.read_text(encoding="utf-8")
        commands = [
            line.split()[0] for language, body in steps(page) if language != "python" for line in lines(body)
        ]
        assert "budgetsearch" in commands
        foreign = set(commands) - {"budgetsearch"}
        assert foreign <= set(FOREIGN)
        assert bool(foreign) == bool(re.search(r"(were|was) not run", text)), page.name


class Reader:
    """Somebody who goes through a page in a folder of their own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        write_rows(folder / "train.jsonl", 200)
        rows = [
            json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        with (folder / "questions.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        base = shutil.copytree(model, folder / "base")
        for place in (folder, base):  # so that the licences of rows and base are stated
            (place / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
        for name in (name for source in SCENARIOS.values() for name in source.split(",")):
            write_choice_task(folder / "tasks", name)
        settings = {
            "model": str(base), "data": str(folder / "train.jsonl"), "space": "lora_small",
            "task_examples": 4, "max_length": 128, "max_trials": 2, "max_epochs": 1,
        }  # fmt: skip
        (folder / "budgetsearch.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        self.environment = {
            **os.environ,
            "BUDGETSEARCH_CACHE": str(folder / "cache"),
            "HF_DATASETS_CACHE": str(folder / "datasets"),
            "HF_HUB_OFFLINE": "1",
        }

    def go_through(self, page: Path) -> None:
        """Every block in its order; a server answers until the page is over."""
        server: subprocess.Popen[str] | None = None
        port = PORT
        try:
            for language, text in steps(page):
                if language == "python":
                    self.run([sys.executable, "-c", text.replace(PORT, port)])
                    continue
                for line in lines(text):
                    arguments = self.shorter(shlex.split(line, comments=True))
                    if arguments[:1] != ["budgetsearch"]:
                        continue
                    if arguments[1] == "serve":
                        server, port = self.serve(arguments)
                    else:
                        self.run([sys.executable, "-m", *arguments])
        finally:
            if server is not None:
                server.terminate()
                said = server.communicate(timeout=60)
                assert server.returncode == 0, said

    def train_again(self, submission: Path) -> None:
        """What the training image runs, where the folder lies here, and to the same weights."""
        text = (submission / "Dockerfile.train").read_text(encoding="utf-8")
        command = json.loads(next(line for line in text.splitlines() if line.startswith("CMD "))[4:])
        arguments = [*command[command.index("budgetsearch") : -1], str(self.folder / "again")]
        done = self.run([sys.executable, "-m", *arguments], submission)
        assert "equal to the bit" in done, done

    def shorter(self, arguments: list[str]) -> list[str]:
        """The page's command with less time, on the CPU; ``--check`` has a test of its own."""
        kept = [
            SHORTER.get(before, word) if arguments[1] not in ("plan",) or before != "--hours" else word
            for before, word in zip(["", *arguments], arguments, strict=False)
            if word != "--check"
        ]
        return [*kept, *MORE.get(kept[1], ())]

    def run(self, arguments: Sequence[str], folder: Path | None = None) -> str:
        done = subprocess.run(
            arguments, cwd=folder or self.folder, env=self.environment, text=True, timeout=400, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        allowed = (0, 1) if "doctor" in arguments else (0,)  # which is honest about a small machine
        assert done.returncode in allowed, f"{arguments}\n{done.stdout}"
        return done.stdout

    def serve(self, arguments: Sequence[str]) -> tuple[subprocess.Popen[str], str]:
        """(the server, once it answers; its port)."""
        given = [*arguments, *([] if "--gpu" in arguments else ["--gpu", "cpu"])]
        process = subprocess.Popen(
            [sys.executable, "-m", *given],
            cwd=self.folder,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        said: list[str] = []
        while not said or "answers on" not in said[-1]:
            said.append(process.stderr.readline())
            assert said[-1], "".join(said)
        return process, said[-1].split()[-1].rpartition(":")[2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_works_as_it_stands(page: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Each command exits with 0, and each piece of Python does what it says."""
    reader = Reader(tmp_path, tiny_model)
    reader.go_through(page)
    if (tmp_path / "submission").is_dir():
        reader.train_again(tmp_path / "submission")
