"""Programs in files that never end: each is stopped, in time, and what is said of it is true."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from budgetsearch.core.errors import DataError
from budgetsearch.run import process
from budgetsearch.storage.lock import RunLock
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.training.data import tokens
from budgetsearch.training.data.examples import Example
from budgetsearch.training.data.limit import Limit, Overlong

LOOP = "{% for a in range(99999) %}"
END = "{% endfor %}"
TEMPLATES = {
    "loops": f"{LOOP}{LOOP}{LOOP}{END}{END}{END}",
    "text": f"{LOOP}{LOOP}{{{{ 'x' }}}}{END}{END}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": f"{LOOP}{{{{ range(99999) | map('string') | sort | length }}}}{END}",
}
"""Chat templates that go on for ever."""


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_without_end_is_a_data_error(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """After its seconds, and the next one is rendered as before."""
    monkeypatch.setattr(tokens, "TEMPLATE_LIMIT", Limit(0.3))
    tokenizer = tokens.load_tokenizer(tiny_model)
    row = Example(({"role": "user", "content": "a"},), "b", "", "row 7")
    good = tokenizer.chat_template
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(DataError, match=r"row 7: the model's chat template.*more than 0.3 s"):
        tokens.render_prompt(tokenizer, row)
    assert time.monotonic() - began < 20
    tokenizer.chat_template = good
    assert "a" in tokens.render_prompt(tokenizer, row)


def test_a_word_that_is_swallowed_is_said_again() -> None:
    """A destructor or a careless library may catch whatever comes: the next word ends it."""
    caught = []

    def deaf() -> None:
        try:
            _busy(time.monotonic() + 20)
        except BaseException as error:
            caught.append(error)
        _busy(time.monotonic() + 20)

    with pytest.raises(Overlong):
        Limit(0.1).call(deaf)
    assert 1 == len(caught)


def test_what_returns_in_time_is_left_alone() -> None:
    """Many calls at the edge of their time: each returns, or raises Overlong, and nothing comes later."""
    limit = Limit(0.01)
    found = []
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        end = time.monotonic() + 0.05 * (len(found) % 7)
        try:
            found.append(limit.call(lambda end=end: _busy(end)))
        except Overlong:
            found.append(-1)
    assert set(found) <= {-1, 1} and 1 in found
    with pytest.raises(KeyError):
        limit.call(lambda: {}["nothing"])
    assert 1 == sum(thread.name == "limit" and thread is limit._watcher for thread in threading.enumerate())


def _busy(end: float) -> int:
    while time.monotonic() < end:
        pass
    return 1


@pytest.mark.parametrize("begun", [False, True])
def test_the_last_words_of_a_hanging_process_are_true(tmp_path: Path, begun: bool) -> None:
    """Nothing was earned before there is a plan: no command is named that knows no run, and the folder can be
    used again. A time on the wall is kept from the first second."""
    if begun:
        (tmp_path / "ledger.sqlite").touch()
    else:
        RunLock(tmp_path).release()
    code = f"""
import time
from pathlib import Path
from types import SimpleNamespace
from budgetsearch.machine.clock import RunClock, Timing
from budgetsearch.run.process import ended_in_time
from budgetsearch.storage.runfolder import RunFolder
engine = SimpleNamespace(end=lambda: None)
with ended_in_time(Timing(RunClock(), 2.0), engine, RunFolder(Path({str(tmp_path)!r})), lambda: False, 0.0):
    time.sleep(600)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert process.EXIT_OVERDUE == done.returncode
    assert begun == ("budgetsearch status" in done.stderr) == ("What was earned" in done.stderr)
    if not begun:
        assert "nothing was earned" in done.stderr
        RunFolder(tmp_path).check_free()
