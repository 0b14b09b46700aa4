"""The submission without Docker: the same steps in a fresh virtual environment, and one request."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import BudgetsearchError
from budgetsearch.core.ports import Say
from budgetsearch.machine import child
from budgetsearch.tools.submit.steps import EXTRA_INDEX, OFFLINE, Steps

START_SECONDS = 900.0
"""So long the server may take to load the model."""
STOP_SECONDS = 60.0
ASK_SECONDS = 300.0
SHOWN_LINES = 12
"""Of what a step that failed has printed."""
OWN = ("PYTHON", "VIRTUAL_ENV")
"""Variables of this environment that the fresh one must not have."""
ASKED = {"prompt": "The capital of France is", "max_new_tokens": 8, "temperature": 0.8, "seed": 1}


def rehearse(folder: Path, steps: Steps, say: Say) -> str:
    """Install, fetch, serve on loopback and ask once; returns the answer's text.

    pip looks where this machine's own settings say, and beside that where the Dockerfile does if they do not
    suffice: torch for one kind of card is not on PyPI.

    Raises:
        BudgetsearchError: a step failed; it says which, and what it printed last.
    """
    with tempfile.TemporaryDirectory(prefix="budgetsearch-submission-") as scratch:
        home = Path(scratch)
        environment = _environment(home)
        _run(child.python("venv", str(home / "venv")), folder, environment, say)
        try:
            _run(steps.install[0], folder, environment, say)
        except BudgetsearchError:
            if steps.index is None:
                raise
            _run(steps.install[0], folder, {**environment, EXTRA_INDEX: steps.index}, say)
        for step in (*steps.install[1:], *steps.fetch):
            _run(step, folder, environment, say)
        command = steps.serve("127.0.0.1", 0)
        with _serving(command, folder, {**environment, **OFFLINE}, home / "server.log", say) as url:
            answer = _ask(url, ASKED)
    say(f"it answered: {answer['text']!r}")
    return str(answer["text"])


def _environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in child.environment().items() if not name.startswith(OWN)}
    path = f"{home / 'venv' / 'bin'}{os.pathsep}{kept.get('PATH', os.defpath)}"
    caches = {"BUDGETSEARCH_CACHE": str(home / "cache"), "HF_HOME": str(home / "huggingface")}
    return {**kept, **caches, child.SAFE_PATH: "1", "PATH": path}


def _run(step: Sequence[str], folder: Path, environment: Mapping[str, str], say: Say) -> None:
    say(" ".join(step))
    try:
        done = subprocess.run(
            _found(step, environment), cwd=folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise BudgetsearchError(f"The submission's step {step[0]} cannot be tried here: {error}") from error
    if done.returncode:
        raise _failed(step, done.stdout)


def _found(step: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """With the program of the fresh environment: a child is looked up on the path of its parent."""
    own = Path(environment["PATH"].split(os.pathsep)[0]) / step[0]
    return [str(own) if own.exists() else step[0], *step[1:]]


@contextmanager
def _serving(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, say: Say
) -> Iterator[str]:
    """The server's address, once it answers; afterwards it has drained."""
    say(" ".join(command))
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            _found(command, environment), cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        yield _address(process, command, log)
        process.terminate()
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            say(f"it did not end within {STOP_SECONDS:g} s of being told to")
            code = 1
        if code:
            raise _failed(command, _text(log))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], command: Sequence[str], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if found := re.search(r"answers on (http://[\w.:]+)", _text(log)):
            return found.group(1)
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise _failed(command, _text(log))


def _ask(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/process", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS) as answer:
            found: dict[str, Any] = read_json(answer.read())
    except (OSError, ValueError) as error:
        raise BudgetsearchError(f"The server of the submission did not answer a request: {error}") from error
    return found


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _failed(step: Sequence[str], output: str) -> BudgetsearchError:
    last = "\n".join(f"  {line}" for line in output.strip().splitlines()[-SHOWN_LINES:])
    return BudgetsearchError(
        f"In a fresh virtual environment a step of the submission failed, so it is not kept:\n"
        f"  {' '.join(step)}\n{last}"
    )
