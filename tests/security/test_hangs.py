"""Programs in files that never end: each is stopped, in time, and what is said of it is true."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from budgetsearch.core.errors import DataError
from budgetsearch.run import process
from budgetsearch.storage.lock import RunLock
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.training.data import supervise
from budgetsearch.training.data.preparer import MODULE
from budgetsearch.training.data.tokens import Sources, prepare

LOOP = "{% for a in range(99999) %}"
END = "{% endfor %}"
TEMPLATES = {
    "loops": f"{LOOP}{LOOP}{LOOP}{END}{END}{END}",
    "text": f"{LOOP}{LOOP}{{{{ 'x' }}}}{END}{END}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": f"{LOOP}{{{{ range(99999) | map('string') | sort | length }}}}{END}",
}
"""Chat templates that go on for ever."""


ROW = "{% if 'evil' in messages[0]['content'] %}"
"""What follows is rendered for one row alone."""


@pytest.fixture(scope="module")
def hanging(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny model whose template a test writes."""
    return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("hanging") / "model"))


def prepared(model: Path, folder: Path, template: str) -> None:
    """Prepare three rows, of which the second is evil, with this template in front of the model's own."""
    own = (model / "chat_template.jinja").with_suffix(".own")
    if not own.exists():
        shutil.copy(model / "chat_template.jinja", own)
    text = template + own.read_text(encoding="utf-8")
    (model / "chat_template.jinja").write_text(text, encoding="utf-8")
    rows = [{"prompt": prompt, "completion": "b"} for prompt in ("a", "evil", "c")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prepare(model, Sources(str(folder / "rows.jsonl")), max_length=64, cache=folder / "cache")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_without_end_is_ended_with_its_process(
    hanging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """Also inside of C code; the error names the row, and no process stays behind."""
    monkeypatch.setattr(supervise, "ROW_SECONDS", 1.0)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: it takes more than 1 s to make its tokens"):
        prepared(hanging, tmp_path, ROW + template + "{% endif %}")
    assert not [one for one in psutil.Process().children(recursive=True) if MODULE in one.cmdline()]


def test_a_template_that_never_ends_at_all_is_named(
    hanging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs before the first row."""
    monkeypatch.setattr(supervise, "ROW_SECONDS", 1.0)
    with pytest.raises(DataError, match="the first that the chat template is given"):
        prepared(hanging, tmp_path, TEMPLATES["filters"])


def test_a_template_that_eats_the_memory_is_ended(
    hanging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the row that it was at."""
    monkeypatch.setattr(supervise, "MOST_BYTES", 2 << 30)
    eats = (
        "{% set x = namespace(y=[]) %}{% for a in range(999) %}{% set x.y = x.y + ['y' * (99999999 + a)] %}"
    )
    with pytest.raises(DataError, match=r"more than 2\.0 GiB, at rows\.jsonl:2"):
        prepared(hanging, tmp_path, f"{ROW}{eats}{END}{{% endif %}}")


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
