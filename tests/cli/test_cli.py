"""The command line: help that teaches, wrong input that touches nothing, one set of names."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.main import get_command

import budgetsearch as bs
from budgetsearch.cli import app
from budgetsearch.cli.output import console
from budgetsearch.core.errors import LateError
from budgetsearch.run import session
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.other_trainers import KNOB_NAMES, SAID
from budgetsearch.run.prepare import Watch
from budgetsearch.run.settings import Settings
from budgetsearch.run.spaces import load_space
from budgetsearch.storage.lock import RunLock
from budgetsearch.storage.runfolder import RunFolder
from tests.support.command_line import invoke

COMMANDS = (
    *("run", "plan", "resume", "status", "report", "compare", "dashboard", "doctor", "spaces"),
    *("reproduce", "verify", "runs"),
)


@pytest.fixture(autouse=True)
def _young(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' process is as old as all tests before; the program's is not."""
    monkeypatch.setattr("budgetsearch.cli.run.process_age", lambda: 0.0)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    """``--help`` shows what the command does and a line to copy."""
    code, text = invoke(command, "--help")
    assert code == 0
    assert f"budgetsearch {command}" in re.sub(r"\s+", " ", text)


def test_the_version_is_the_packages() -> None:
    """``--version`` prints it."""
    assert (0, f"budgetsearch {bs.__version__}\n") == invoke("--version")


def test_flags_settings_and_python_arguments_are_the_same() -> None:
    """One set of names: a setting that one of the three lacks would be a trap."""
    command = get_command(app).commands["run"]  # type: ignore[attr-defined]
    flags = {p.name for p in command.params} - {"config", "help", "resume", "log", "file"}
    own = {"config", "watchers", "callbacks", "progress", "resume"}
    arguments = set(inspect.signature(bs.run).parameters) - own
    assert set(Settings.model_fields) == flags
    assert set(Settings.model_fields) == arguments


def test_spaces_lists_the_ones_that_ship() -> None:
    """Both spaces are there with their files."""
    code, text = invoke("spaces")
    assert code == 0
    assert "lora " in text
    assert "lora_small" in text


@pytest.fixture
def good(tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run that would work, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))
    return [
        *("run", "--model", str(tiny_model), "--data", str(rows_file), "--gpu", "cpu"),
        *("--hours", "0.01", "--out", "out"),
    ]


def broken_row(tmp_path: Path) -> str:
    """A data file in which no row has its columns."""
    path = tmp_path / "broken.jsonl"
    rows = [{"text": "no"}] * 3
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def empty_file(tmp_path: Path) -> str:
    """A data file of zero bytes."""
    path = tmp_path / "empty.jsonl"
    path.touch()
    return str(path)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--data", "nowhere.jsonl", r"nowhere\.jsonl"),
        ("--data", empty_file, "empty"),
        ("--data", broken_row, r"broken\.jsonl:1"),
        ("--data", "reasoning-gym:family_relation", "family_relationships"),
        ("--model", "./nowhere", "nowhere"),
        ("--gpu", "h1000", "h100"),
        ("--gpu", "a100", "a100"),
        ("--hours", "0", "hours"),
        ("--hours", "-1", "hours"),
        ("--hours", "nan", "hours"),
        ("--space", "lorra", "lora"),
        ("--seed", "-1", "seed"),
        ("--targets", "q_proj,,", "empty name"),
        ("--out", "/proc/nowhere", "cannot be made"),
        ("--out", "x" * 300, "cannot be made"),
    ],
)
def test_wrong_input_is_one_error_with_code_2_and_touches_nothing(
    good: list[str], tmp_path: Path, flag: str, value: object, message: str
) -> None:
    """One line that names the place; no run folder, and no traceback."""
    text_value = value(tmp_path) if callable(value) else str(value)
    code, text = invoke(*good, f"{flag}={text_value}")
    assert code == 2, text
    assert "Traceback" not in text
    assert text.count("error:") == 1
    assert re.search(message, text.replace("\n", " "))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["run", "plan", "doctor"])
def test_data_need_no_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """DATA is --data; naming two different ones is an error."""
    monkeypatch.chdir(tmp_path)
    _, alone = invoke(command, "nowhere.jsonl", "--gpu", "cpu")
    assert "there is no data file at 'nowhere.jsonl'" in " ".join(alone.split())
    code, twice = invoke(command, "one.jsonl", "--data", "other.jsonl", "--gpu", "cpu")
    assert code == 2
    assert "given twice: one.jsonl and --data other.jsonl" in twice


@pytest.mark.parametrize(
    ("arguments", "knob", "value"),
    [
        (("--learning-rate", "1e-4"), "learning_rate", 1e-4),
        (("--lr=3e-4",), "learning_rate", 3e-4),
        (("--lr", "nonsense"), "learning_rate", 1e-4),
        (("--rank", "64"), "rank", 64),
        (("--lora-alpha", "32"), "alpha", 32),
        (("--lora_dropout", "0.1"), "dropout", 0.1),
        (("--quantization", "int8"), "quantization", "int8"),
        (("--load-in-4bit",), "quantization", "nf4"),
        (("--load-in-4bit", "--gpu", "cpu"), "quantization", "nf4"),
    ],
)
def test_an_option_for_a_searched_value_is_answered_with_a_space_to_copy(
    tmp_path: Path, arguments: tuple[str, ...], knob: str, value: object
) -> None:
    """The lines that the error shows are a search space in which the knob has that value."""
    code, text = invoke("run", "train.jsonl", *arguments)
    assert code == 2
    own = tmp_path / "own.yaml"
    own.write_text(text.split("\n\n")[1], encoding="utf-8")
    assert (value,) == tuple(load_space(own).values_of(knob))


def test_the_space_to_copy_is_the_runs_own(tmp_path: Path) -> None:
    """That of --space or of the settings file, with nothing changed but the value that is fixed."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "dimensions:\n  quantization: {kind: constant, value: fp32}\n  rank: {kind: choice, values: [2, 3]}\n"
        "  learning_rate: {kind: float, low: 1.0e-5, high: 2.0e-5}\n",
        encoding="utf-8",
    )
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"space: {mine}\n", encoding="utf-8")
    for given in (("--space", str(mine)), ("--config", str(settings))):
        _, text = invoke("run", "train.jsonl", "--learning-rate", "1e-4", *given)
        own = tmp_path / "own.yaml"
        own.write_text(text.split("\n\n")[1], encoding="utf-8")
        before, after = (
            {each["name"]: {**each, "source": ""} for each in load_space(path).to_dict()["dimensions"]}
            for path in (mine, own)
        )
        fixed = {"name": "learning_rate", "kind": "constant", "value": 1e-4}
        assert {**before, "learning_rate": {**after["learning_rate"], **fixed}} == after


def test_a_pipe_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else wide enough for the table."""
    for columns, width in ((None, 120), ("70", 70)):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
        assert width == console().width


@pytest.mark.parametrize("name", sorted(SAID))
def test_an_option_of_other_trainers_is_answered_with_one_that_exists(name: str) -> None:
    """What the answer names is an option of ``run``, or it says why there is none."""
    given = f"--{name.replace('_', '-')}"
    code, text = invoke("run", given, "3")
    assert code == 2
    known = {option for one in get_command(app).commands["run"].params for option in one.opts}  # type: ignore[attr-defined]
    assert set(re.findall(r"--[a-z-]+", text)) - {given} <= known
    assert f"{given}: there is no such setting here; " in text


@pytest.mark.parametrize("name", sorted(SAID))
def test_in_a_file_the_answer_is_a_key_that_the_file_may_have(
    name: str, good: list[str], tmp_path: Path
) -> None:
    """No flag is named, the remedy has its verb, and what is to be written is taken as it stands."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"{name}: 3\n")
    code, text = invoke(*good, "--config", str(file))
    said = " ".join(text.split())
    assert code == 2
    assert f"settings.yaml: {name}: there is no such setting here; " in said
    told = re.search(r"; (?:use `([^`]+)`|use --log|give|`budgetsearch resume)", said)
    assert told is not None, said
    assert {"--log"} >= set(re.findall(r"--[a-z-]+", said[said.index("; ") :]))
    if told[1] is not None:
        file.write_text(told[1].replace("FILE.yaml", "lora"))
        assert load_settings({"gpu": "cpu"}, file)


def test_all_that_is_to_be_fixed_stands_in_one_answer_and_a_slip_is_told_what_was_meant(
    good: list[str], tmp_path: Path
) -> None:
    """Two knobs of another trainer make one space; a letter too few gets the name, and the same answer."""
    code, text = invoke(*good, "--rank=8", "--learning-rate", "1e-4")
    assert 2 == code
    assert "the search decides rank and learning_rate. To fix them, save" in " ".join(text.split())
    (tmp_path / "own.yaml").write_text(text[text.index("dimensions:") : text.index("The others")])
    space = load_space(str(tmp_path / "own.yaml"))
    assert ([8], [1e-4]) == (list(space.values_of("rank")), list(space.values_of("learning_rate")))
    code, text = invoke(*good, "--learning-rat", "1e-4")
    assert 2 == code
    told = " ".join(text.split())
    assert "Did you mean --learning-rate? Then the search decides learning_rate." in told
    assert "learning_rate: {kind: constant, value: 1e-4}" in told
    assert "Did you mean" not in invoke(*good, "--nothing-like-it", "3")[1]


def test_no_name_of_other_trainers_is_a_setting_here() -> None:
    """An answer about a setting that exists would be wrong."""
    assert not (set(SAID) | set(KNOB_NAMES)) & set(Settings.model_fields)


def test_a_run_folder_in_use_is_refused(good: list[str], tmp_path: Path) -> None:
    """The lock's owner is named, and the folder stays as it is."""
    folder = RunFolder(tmp_path / "out")
    folder.path.mkdir()
    lock = RunLock(folder.path)
    lock.sign()
    code, text = invoke(*good)
    assert code == 2
    assert "in use by process" in text
    assert [tmp_path / "out" / "lock"] == list(folder.path.iterdir())
    lock.release()


def test_a_run_in_preparation_has_no_status_yet(tmp_path: Path) -> None:
    """Between the folder and the first event there is nothing to show; that is no broken run."""
    folder = RunFolder(tmp_path / "out")
    folder.path.mkdir()
    lock = RunLock(folder.path)
    lock.sign()
    code, text = invoke("status", str(folder.path))
    assert code == 2
    assert f"still being prepared by process {os.getpid()}" in text and "(it has just begun)" in text
    heard = list[str]()
    say = session._noting(folder, heard.append)
    say("fetching the model")
    assert ["fetching the model"] == heard
    assert "(fetching the model)" in invoke("status", str(folder.path))[1]
    folder.tidy()
    assert not folder.preparing.exists()
    lock.release()


def test_a_folder_with_something_else_is_refused(good: list[str], tmp_path: Path) -> None:
    """Nobody's files are mixed with a run's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    code, text = invoke(*good)
    assert code == 2
    assert "not empty" in text


@pytest.mark.parametrize("command", ["resume", "status", "report", "dashboard"])
def test_a_folder_without_a_run_is_named(command: str, tmp_path: Path) -> None:
    """The commands on a run say how to start one."""
    code, text = invoke(command, str(tmp_path / "nothing"))
    assert code == 2
    assert "does not exist" in text
    assert "budgetsearch run" in text


def test_a_budget_below_the_minimum_is_refused(good: list[str], tmp_path: Path) -> None:
    """A budget of a second cannot load the model; the answer says how much would do, nothing is left."""
    code, text = invoke(*good, "--hours=0.0003")
    assert code == 2
    assert "too small" in text
    assert not (tmp_path / "out").exists()


def test_a_budget_that_went_on_fetching_the_model_does_when_the_run_is_started_again(
    good: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing says that it was too small in itself, so no other number is named."""

    def late(_settings: object, _say: object, watch: Watch, *_: object) -> None:
        watch.once = 99.0
        raise LateError("the data are not prepared after 100 s")

    monkeypatch.setattr(session, "choose", lambda *_: SimpleNamespace(engine=Nobody()))
    monkeypatch.setattr(session, "prepare_inputs", late)
    monkeypatch.setattr("budgetsearch.cli.run.process_age", lambda: 100.0)
    code, text = invoke(*good, "--hours=100s")
    assert 2 == code
    told = "99 s of that went to fetching and converting the model, which is done: start the run again"
    assert told in " ".join(text.split())


class Nobody:
    """An engine that is never asked for anything."""

    def warm_up(self) -> None:
        """See the port."""

    def close(self) -> None:
        """See the port."""


@pytest.mark.parametrize("once", [0.0, 15.0])
def test_plan_and_run_name_one_number_before_and_after_a_preparation_that_was_too_slow(
    good: list[str], monkeypatch: pytest.MonkeyPatch, once: float
) -> None:
    """By guesses first, which are called so; once a run has found out that this machine takes longer to
    begin, both by that, but for what was fetched and converted once and for all."""

    def hours(command: str, *arguments: str) -> str:
        code, text = invoke(command, *good[1:], *arguments)
        assert 2 == code, text
        assert "a guess: nothing was measured here yet" in " ".join(text.split())
        return " ".join(text.split()).split("Use --hours ")[1].split()[0]

    def late(_settings: object, _say: object, watch: Watch, *_: object) -> None:
        watch.once = once
        raise LateError("the data are not prepared after 40 s")

    guessed = hours("run", "--hours=0.0001")
    assert guessed == hours("plan", "--hours=0.0001") == hours("run", "--hours=5s")
    monkeypatch.setattr(session, "choose", lambda *_: SimpleNamespace(engine=Nobody()))
    monkeypatch.setattr(session, "prepare_inputs", late)
    monkeypatch.setattr("budgetsearch.cli.run.process_age", lambda: 40.0)
    found = hours("run", f"--hours={guessed}")
    assert int(found[:-1]) > 1.5 * 2 * (40.0 - once)
    assert int(found[:-1]) < 1.5 * (2 * (40.0 - once) + 30.0)
    assert found == hours("plan", f"--hours={guessed}") == hours("run", f"--hours={guessed}")
