"""Whatever is typed or written into a file: never a traceback, always code 2, a place and a remedy.

No run is started: where the input turns out to be good, the moment before the first job stands for it.
"""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from budgetsearch.cli import app
from budgetsearch.core.errors import DataError
from budgetsearch.run import session as compose
from budgetsearch.run.settings import Settings
from budgetsearch.training.data.samples import load_samples

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
REMEDIES = (
    r"\b(use|give|name|fill|remove|mend|must|takes?|correct|check|save|needs?|write|try|choose|convert|make|add|drop)\b"
    r"|one of|did you mean|such as|what works|the settings are|at least|--help|is not a valid|\bis needed"
)


class Began(Exception):
    """The input was good: here the run would begin."""


@pytest.fixture(autouse=True)
def _nothing_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def search(*arguments: Any, **more: Any) -> None:
        raise Began

    monkeypatch.setattr(compose, "search", search)
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def good(tiny_model: Path, rows_file: Path) -> list[str]:
    """Options of a run that would begin."""
    return ["--model", str(tiny_model), "--data", str(rows_file), "--gpu", "cpu", "--hours", "0.01"]


def began(result: Result) -> bool:
    """Whether the run would have begun; of an error that nobody foresaw the command line makes one line."""
    return result.exit_code == 1 and "error: Began: ." in result.output


def refused(arguments: list[str], place: str) -> str | None:
    """What the command said, or None where the input was good; anything else is a failure."""
    result = CliRunner().invoke(app, arguments)
    if began(result):
        return None
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert result.exit_code == 2, (arguments, result.exit_code, result.output)
    said = re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)
    assert "Traceback" not in said
    assert re.search(place, said), (place, said)
    assert re.search(REMEDIES, said, re.IGNORECASE), said
    return said


# ---------------------------------------------------------------------- strategies

WORDS = st.text(string.ascii_letters + string.digits + " _-:/.{}[]#&*!|>%@`\"'\\\n\t\x00é€😀", max_size=20)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(allow_nan=True, allow_infinity=True),
    WORDS,
    st.sampled_from(
        ["low", "high", "choice", "float", "int", "tied", "constant", "rank", "quantization", "nf4"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(WORDS, st.integers(), st.booleans(), st.none()), inner, max_size=4),
    ),
    max_leaves=12,
)
KEYS = st.sampled_from(
    [
        "kind",
        "values",
        "ordered",
        "low",
        "high",
        "log",
        "prior",
        "center",
        "spread",
        "weights",
        "when",
        "to",
        "factor",
    ]
)
NAMES = st.one_of(st.sampled_from(["quantization", "rank", "learning_rate", "alpha", "dropout"]), WORDS)
KINDS = st.sampled_from(["choice", "float", "int", "constant", "tied", "normal", ""])
DIMENSION = st.one_of(
    VALUES,
    st.dictionaries(KEYS, VALUES, max_size=6),
    st.builds(lambda kind, rest: {"kind": kind, **rest}, KINDS, st.dictionaries(KEYS, VALUES, max_size=5)),
)
SPACES = st.one_of(
    VALUES,
    st.builds(lambda dimensions: {"dimensions": dimensions}, st.dictionaries(NAMES, DIMENSION, max_size=5)),
    st.builds(
        lambda d, extra: {"dimensions": d, **extra},
        st.dictionaries(NAMES, DIMENSION, max_size=3),
        st.dictionaries(WORDS, VALUES, max_size=2),
    ),
)


def _write_yaml(path: Path, value: Any) -> None:
    path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")


# --------------------------------------------------------------------------- YAML


@FUZZ
@given(value=SPACES)
def test_any_search_space_is_read_or_refused_with_its_file(
    good: list[str], tmp_path: Path, value: Any
) -> None:
    """Any YAML value at all, and such as look like a space."""
    file = tmp_path / "space.yaml"
    _write_yaml(file, value)
    refused(["run", *good, "--space", str(file)], r"space\.yaml|search space")


@FUZZ
@given(raw=st.binary(max_size=200))
def test_any_bytes_as_a_search_space_are_refused_with_the_file(
    good: list[str], tmp_path: Path, raw: bytes
) -> None:
    """No UTF-8, no YAML, no mapping."""
    file = tmp_path / "space.yaml"
    file.write_bytes(raw)
    assert refused(["run", *good, "--space", str(file)], r"space\.yaml")


@FUZZ
@given(text=st.text(alphabet="a:-[]{}&*!|>'\"%@`#, \n\t?0.1", max_size=60))
def test_any_yaml_text_as_settings_is_read_or_refused_with_the_file(
    good: list[str], tmp_path: Path, text: str
) -> None:
    """Broken syntax has its line, whatever it is."""
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    refused(["run", *good, "--config", str(file)], r"settings\.yaml")


@FUZZ
@given(
    values=st.dictionaries(
        st.one_of(st.sampled_from(sorted(Settings.model_fields)), WORDS), VALUES, min_size=1, max_size=4
    )
)
def test_any_settings_are_taken_or_refused_with_file_and_key(tmp_path: Path, values: dict[str, Any]) -> None:
    """Known keys with any value, and unknown keys."""
    file = tmp_path / "settings.yaml"
    values = {**values, "out": "out"} if not isinstance(values.get("out"), str) else values
    values.setdefault("gpu", "cpu")
    _write_yaml(file, values)
    refused(["run", "--config", str(file)], r"settings\.yaml|--\w+|no |not |There is|gpu|model|data")


# --------------------------------------------------------------------------- data

ROW_KEYS = st.one_of(
    st.sampled_from(
        ["messages", "prompt", "completion", "instruction", "input", "output", "question", "answer"]
    ),
    WORDS,
)
MESSAGES = st.lists(
    st.one_of(
        VALUES,
        st.fixed_dictionaries(
            {"role": st.one_of(st.sampled_from(["user", "assistant", "system"]), VALUES), "content": VALUES}
        ),
    ),
    max_size=4,
)
ROWS = st.one_of(VALUES, st.dictionaries(ROW_KEYS, st.one_of(VALUES, MESSAGES), max_size=4))


@FUZZ
@given(rows=st.lists(ROWS, max_size=5))
def test_any_rows_of_jsonl_are_read_or_refused_with_their_line(tmp_path: Path, rows: list[Any]) -> None:
    """Any JSON value on any line."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    _read(file, r"rows\.jsonl(:(row )?\d+| is empty| holds no rows)")


@FUZZ
@given(
    raw=st.binary(max_size=300), name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt"])
)
def test_any_bytes_as_data_are_read_or_refused_with_the_file(tmp_path: Path, raw: bytes, name: str) -> None:
    """In every format."""
    file = tmp_path / name
    file.write_bytes(raw)
    _read(file, re.escape(name))


HUGE = {
    "deep": "[" * 100_000,
    "deep and closed": "[" * 5_000 + "]" * 5_000,
    "long number": "1" + "0" * 5_000,
    "date": "2001-99-99",
    "laughs": "model: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{key}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
        for key, a, b in zip(
            ("data", "valid", "gpu", "space", "targets", "storage", "revision"),
            "abcdefg",
            "bcdefgh",
            strict=True,
        )
    )
    + "hours: *h\n",
}


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("name", ["deep", "deep and closed", "long number"])
def test_json_that_exhausts_its_reader_is_refused_with_its_line(tmp_path: Path, kind: str, name: str) -> None:
    """Nesting without end, and a number of thousands of digits."""
    file = tmp_path / f"rows.{kind}"
    file.write_text('{"question": ' + HUGE[name] + ', "answer": "a"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.json"):
        load_samples(str(file))


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("flag", ["--config", "--space"])
def test_yaml_that_exhausts_its_reader_is_refused_with_its_file(
    good: list[str], tmp_path: Path, name: str, flag: str
) -> None:
    """The same, and aliases of aliases that would unfold to gigabytes in a message."""
    file = tmp_path / "big.yaml"
    text = HUGE[name]
    file.write_text(text if name == "laughs" else f"hours: {text}\n", encoding="utf-8")
    said = refused(["run", *good[:-2], flag, str(file)], r"big\.yaml")
    assert said is not None
    assert len(said) < 5_000


@FUZZ
@given(text=st.text(alphabet="ab,\"'\r\n\t;\x00 ", max_size=80))
def test_any_csv_is_read_or_refused_with_its_line(tmp_path: Path, text: str) -> None:
    """Quotes, empty lines and columns as they come."""
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\n" + text, encoding="utf-8", newline="")
    _read(file, r"rows\.csv")


def _read(file: Path, place: str) -> None:
    said = ""
    try:
        examples = load_samples(str(file))
    except DataError as error:
        said = str(error)
    else:
        assert all(one.answer.strip() for one in examples)
    if said:
        assert re.search(place, said), said
        assert re.search(REMEDIES, said, re.IGNORECASE), said


@FUZZ
@given(rows=st.lists(ROWS, min_size=1, max_size=2))
def test_the_command_refuses_bad_data_before_it_makes_anything(
    tiny_model: Path, tmp_path: Path, rows: list[Any]
) -> None:
    """The first row is looked at before there is a run folder."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    said = refused(
        [
            "run",
            "--model",
            str(tiny_model),
            "--data",
            str(file),
            "--gpu",
            "cpu",
            "--hours",
            "0.01",
            "--out",
            "o",
        ],
        r"rows\.jsonl",
    )
    if said is not None:
        assert not (tmp_path / "o").exists()


# --------------------------------------------------------------------------- flags

FLAGS = sorted(
    name
    for name in Settings.model_fields
    if name not in ("trust_remote_code", "keep_checkpoints", "torch_compile", "fresh_calibration")
)
PRINTABLE = st.text(string.printable.replace("\x0b", "").replace("\x0c", ""), max_size=16)
FLAG_VALUES = st.one_of(
    PRINTABLE,
    st.sampled_from(
        [
            "nan",
            "inf",
            "-inf",
            "1e309",
            "-1",
            "0",
            "1/0",
            "1/3/5",
            "",
            " ",
            "\x00",
            "-",
            "--",
            "~",
            "/",
            "..",
            "é",
        ]
    ),
    st.integers(-(10**30), 10**30).map(str),
    st.floats().map(str),
)


@FUZZ
@given(name=st.sampled_from(FLAGS), value=FLAG_VALUES)
def test_any_value_of_any_flag_is_taken_or_refused_with_a_place(
    good: list[str], name: str, value: str
) -> None:
    """One message that names the flag or the thing, and what would do."""
    flag = f"--{name.replace('_', '-')}"
    more = [] if name == "out" else ["--out", "out"]
    refused(["run", *good, *more, f"{flag}={value}"], rf"{flag}|{name}|no |not |There is|there is|is empty")


@FUZZ
@given(
    words=st.lists(
        st.one_of(PRINTABLE, st.sampled_from(["--hours", "--gpu", "run", "--help", "-h", "--"])), max_size=4
    )
)
@pytest.mark.parametrize("command", ["run", "plan", "resume", "status", "report", "doctor", "spaces"])
def test_any_words_on_the_command_line_never_give_a_traceback(command: str, words: list[str]) -> None:
    """The code is 0 for help, 1 for a failed check of the doctor, 2 for everything that is wrong."""
    if command == "doctor" and len(words) < 2:
        return  # it would look at this machine, which takes its time
    result = CliRunner().invoke(app, [command, *words])
    if began(result):
        return
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    assert result.exit_code in (0, 1, 2)
    if result.exit_code == 1:
        assert command == "doctor"


@pytest.mark.parametrize("command", ["resume", "status", "report", "dashboard"])
@pytest.mark.parametrize("content", [b"", b"SQLite format 3\x00", b"no ledger at all", b"\x00" * 5000])
def test_any_file_in_the_ledgers_place_is_refused_with_its_path(
    tmp_path: Path, command: str, content: bytes
) -> None:
    """An empty one belongs to a run that never began; another one is damaged. It is never touched."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "ledger.sqlite").write_bytes(content)
    result = CliRunner().invoke(app, [command, str(run)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2), result.output
    assert "error:" in result.output
    assert str(run) in result.output.replace("\n", "")
    assert content == (run / "ledger.sqlite").read_bytes()
