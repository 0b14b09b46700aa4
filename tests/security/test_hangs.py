"""Programs in files that never end: each is stopped, in time, and what is said of it is true."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import psutil
import pytest

import budgetsearch
from budgetsearch.core.errors import DataError
from budgetsearch.run import process
from budgetsearch.storage.lock import RunLock
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.training.data import supervise
from budgetsearch.training.data.apart import EncoderApart
from budgetsearch.training.data.conversation import Conversation, Sample, Turn
from budgetsearch.training.data.encoder import Encoder
from budgetsearch.training.data.encoding import MODULE as ENCODING
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


EATS = (
    "{% set x = namespace(y=[]) %}{% for a in range(999) %}{% set x.y = x.y + ['y' * (99999999 + a)] %}" + END
)
ROW = "{% if 'evil' in messages[0]['content'] %}"
"""What follows is rendered for one row alone."""


@pytest.fixture(scope="module")
def hanging(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny model whose template a test writes."""
    return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("hanging") / "model"))


def with_template(model: Path, template: str) -> Path:
    """The model with this template in front of its own."""
    own = (model / "chat_template.jinja").with_suffix(".own")
    if not own.exists():
        shutil.copy(model / "chat_template.jinja", own)
    text = template + own.read_text(encoding="utf-8")
    (model / "chat_template.jinja").write_text(text, encoding="utf-8")
    return model


def write_rows(file: Path, asked: Sequence[str], more: Sequence[dict[str, str]] = ()) -> None:
    """A row for each of what is asked; each ends with these turns."""
    rows = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": "b"}, *more]}
        for one in asked
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def prepared(model: Path, folder: Path, template: str) -> None:
    """Prepare three rows, of which the second is evil, with this template in front of the model's own."""
    with_template(model, template)
    write_rows(folder / "rows.jsonl", ("a", "evil", "c"))
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
    with pytest.raises(DataError, match=r"more than 2\.0 GiB, at rows\.jsonl:2"):
        prepared(hanging, tmp_path, f"{ROW}{EATS}{{% endif %}}")


ASKED = "{% if messages | length == 2 and 'evil' in messages[0]['content'] %}"
"""What follows is rendered where the answer is asked for, after which another turn follows in the data."""


def test_what_asks_for_an_answer_is_rendered_in_the_preparation(
    hanging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later process, which has no such limits, is the first to render it."""
    monkeypatch.setattr(supervise, "ROW_SECONDS", 1.0)
    with_template(hanging, f"{ASKED}{TEMPLATES['filters']}{{% endif %}}")
    thanks = [{"role": "user", "content": "thanks"}]
    write_rows(tmp_path / "train.jsonl", ("x", "y"))
    write_rows(tmp_path / "rows.jsonl", ("a", "evil"), thanks)
    sources = Sources(str(tmp_path / "train.jsonl"), valid=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: it takes more than 1 s to make its tokens"):
        prepare(hanging, sources, max_length=64, cache=tmp_path / "cache")


def test_questions_beside_a_run_have_the_same_limits(
    hanging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What compares, exports or serves asks a process that is ended when a template takes too long or too
    much; the next question has a new one."""
    monkeypatch.setattr(supervise, "ROW_SECONDS", 1.5)
    monkeypatch.setattr(supervise, "MOST_BYTES", 2 << 30)
    template = f"{ROW}{TEMPLATES['filters']}{{% endif %}}{ROW.replace('evil', 'fat')}{EATS}{{% endif %}}"
    model = with_template(hanging, template)

    def sample(text: str) -> Sample:
        return Sample(Conversation((Turn("user", text), Turn("assistant", "b"))), place="row 2")

    with closing(EncoderApart(model)) as encoder:
        here = Encoder(encoder.tokenizer)
        assert here.prompt(sample("good")) == encoder.prompt(sample("good"))
        assert here.reader.answer(encoder.ids("b")) == encoder.reader.answer(encoder.ids("b")) == "b"
        with pytest.raises(
            DataError, match=r"row 2: it takes more than 1\.5 s to make its tokens; leave it out"
        ):
            encoder.prompt(sample("evil"))
        monkeypatch.setattr(supervise, "ROW_SECONDS", 60.0)
        with pytest.raises(DataError, match=r"row 2: it takes more than 2\.0 GiB of memory"):
            encoder.prompt(sample("fat"))
    assert not [one for one in psutil.Process().children(recursive=True) if ENCODING in one.cmdline()]


def test_templates_are_rendered_where_there_are_limits_alone() -> None:
    """Nobody else makes what renders them."""
    root = Path(budgetsearch.__file__).parent
    renders = re.compile(
        r"\b(Encoder|Template)\((?!Protocol)|\.apply_chat_template\(|render_jinja_template\("
    )
    found = {file.name for file in root.rglob("*.py") if renders.search(file.read_text(encoding="utf-8"))}
    assert {"encoder.py", "encoding.py", "preparer.py", "templates.py"} == found


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
