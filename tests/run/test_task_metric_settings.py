"""A task of lm-eval as the metric, before the first second is spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import SettingsError, UntrustedCode
from budgetsearch.core.metric import Metric, is_code, is_function, is_task_file, read_metric
from budgetsearch.machine.detect import detect
from budgetsearch.run.calibrations import _conditions
from budgetsearch.run.configuration import CONFIG_NAME, load_settings
from budgetsearch.run.metric import anchored_metric, said_of_metric, with_direction
from budgetsearch.run.permissions import check_permitted, check_source
from budgetsearch.run.preflight import anchored
from budgetsearch.run.settings import Settings
from budgetsearch.run.spaces import load_space
from budgetsearch.training import documents, harness, task_facts
from budgetsearch.training.task_facts import facts_of
from tests.support.local_tasks import write_choice_task, write_own_tasks


def settings_of(folder: Path, **given: Any) -> Settings:
    """Of a run with these."""
    return load_settings({"gpu": "cpu", "space": "lora_small", **given}, cwd=folder)


def test_which_names_are_tasks_and_which_are_code() -> None:
    """A name is one that lm-eval ships; a path is somebody's file, whose templates and functions run."""
    kinds = {
        name: (is_function(name), is_task_file(name), is_code(name))
        for name in ("lm_eval:gsm8k", "lm_eval:mine.yaml", "lm_eval:tasks/mine", "scoring:judge", "f1")
    }
    assert {
        "lm_eval:gsm8k": (False, False, False),
        "lm_eval:mine.yaml": (False, True, True),
        "lm_eval:tasks/mine": (False, True, True),
        "scoring:judge": (True, False, True),
        "f1": (False, False, False),
    } == kinds
    assert Metric("lm_eval:mine", "min") == read_metric("lm_eval:/home/me/tasks/mine.yaml", "min")
    for name in ("lm_eval:", "lm_eval:gsm8k,arc_easy"):
        with pytest.raises(SettingsError, match="name one task"):
            read_metric(name, None)


def test_without_lm_eval_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, at once."""
    monkeypatch.setattr(task_facts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"lm_eval:gsm8k.*pip install 'budgetsearch\[eval\]'"):
        said_of_metric(settings_of(tmp_path, metric="lm_eval:gsm8k"))


@pytest.fixture
def definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks on local files, in a folder."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "definitions"
    write_choice_task(folder)
    write_own_tasks(folder)
    return folder


def test_the_direction_is_the_tasks_own(
    definitions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before the run begins, and written down, so that nothing later needs lm-eval for it."""
    monkeypatch.chdir(tmp_path)
    asked = settings_of(tmp_path, metric="lm_eval:definitions/surprise_local.yaml")
    found = with_direction(asked)
    assert ("min", "lm_eval:surprise_local, min") == (found.direction, said_of_metric(asked))
    with pytest.raises(SettingsError, match=r"surprise.* is better the lower it is"):
        with_direction(asked.model_copy(update={"direction": "max"}))
    written = anchored(found)
    assert f"lm_eval:{definitions}/surprise_local.yaml" == written.metric == anchored_metric(asked.metric)
    assert Metric("lm_eval:surprise_local", "min") == read_metric(written.metric, written.direction)


def test_what_cannot_be_asked_is_refused_in_one_line(
    definitions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such file, no such name, data that are not here, a model's code, a metric of all at once."""
    from lm_eval.tasks import TaskManager

    def manager(folder: Path | None) -> Any:
        return TaskManager(include_path=str(folder or definitions), include_defaults=False)

    def write(name: str, **changed: Any) -> str:
        """The task of colours with something else in it, as YAML that is JSON."""
        import yaml

        task = yaml.safe_load((definitions / "choices_local.yaml").read_text(encoding="utf-8"))
        path = definitions / f"{name}.yaml"
        path.write_text(json.dumps({**task, "task": name, **changed}), encoding="utf-8")
        return f"lm_eval:{path}"

    monkeypatch.setattr(documents, "task_manager", manager)
    f1 = [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]
    for metric, words in {
        f"lm_eval:{definitions}/nothing.yaml": "there is no file",
        "lm_eval:/nowhere/at/all": "there is no folder /nowhere/at",
        "lm_eval:choises_local": "did you mean 'choices_local'",
        f"lm_eval:{definitions}/choises_local": "did you mean 'choices_local'",
        write("far", dataset_path="nobody/nothing", dataset_kwargs=None): "data cannot be fetched",
        write("unsafe", unsafe_code=True): "that a model wrote",
        write("together", metric_list=f1): "no number for each document",
    }.items():
        said = task_facts._found(metric, "/")
        assert words in str(said.get("error")), said
        assert "\n" not in str(said["error"])
    assert {"metric": "acc", "higher": True} == task_facts._found(f"lm_eval:{definitions}/choices_local", "/")
    with pytest.raises(SettingsError, match=r"--metric lm_eval:.*nothing.yaml cannot be used: there is no"):
        facts_of(f"lm_eval:{definitions}/nothing.yaml", "/")
    # What is ruled out is looked for in a process of its own.
    missing = type("Ended", (), {"stdout": '{"missing": true}', "returncode": 0})
    monkeypatch.setattr(task_facts.subprocess, "run", lambda *given, **more: missing)
    with pytest.raises(SettingsError, match="pip install"):
        facts_of("lm_eval:arc_easy", "/")


def test_a_log_likelihood_is_not_taken_for_the_perplexity_that_is_made_of_it() -> None:
    """By example it is better the higher it is: the next metric counts, or it under its own direction."""
    listed = [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "higher_is_better": True},
    ]
    assert ("acc", True) == harness.first_metric(listed, {"perplexity": -3.0, "acc": 1})
    alone = {"perplexity": -3.0, "metrics": ["perplexity"]}
    assert ("perplexity", True) == harness.first_metric(listed[:1], alone)


def test_a_strangers_folder_names_no_definition_and_fetches_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A definition is code like a function; a task that lm-eval ships is only fetched, and a settings file
    may name it. A run from elsewhere needs the same word again."""
    config = "metric: lm_eval:{}\ngpu: cpu\nspace: lora_small\n"
    (tmp_path / CONFIG_NAME).write_text(config.format("theirs.yaml"), encoding="utf-8")
    with pytest.raises(UntrustedCode, match=r"the task lm_eval:theirs.yaml run.*--metric lm_eval:the"):
        load_settings({}, cwd=tmp_path)
    (tmp_path / CONFIG_NAME).write_text(config.format("gsm8k"), encoding="utf-8")
    assert "lm_eval:gsm8k" == load_settings({}, cwd=tmp_path).metric

    monkeypatch.chdir(tmp_path)
    theirs = {"metric": f"lm_eval:{tmp_path}/theirs.yaml", "direction": "max"}
    with pytest.raises(UntrustedCode, match=r"--metric lm_eval:/.*theirs.yaml"):
        check_permitted(theirs, {})
    check_permitted(theirs, {"metric": "lm_eval:theirs.yaml"})
    with pytest.raises(SettingsError, match="the metric that it has"):
        check_permitted(theirs, {"metric": "lm_eval:other.yaml"})
    with pytest.raises(SettingsError, match="--metric lm_eval:gsm8k"):
        check_source(tmp_path, "metric", "lm_eval:gsm8k", None)
    check_source(tmp_path, "metric", "lm_eval:gsm8k", "lm_eval:gsm8k")
    check_source(tmp_path, "metric", f"lm_eval:{tmp_path}/theirs.yaml", None)


def test_another_definition_is_measured_anew(definitions: Path, tmp_path: Path) -> None:
    """What a calibration says of an answer holds for the task as it was; of other metrics nothing changes."""
    space, card = load_space("lora_small"), detect("cpu", None)
    asked = settings_of(tmp_path, metric=f"lm_eval:{definitions}/choices_local.yaml")
    before = _conditions(asked, space, card)
    assert before == _conditions(asked, space, card)
    (definitions / "mine.py").write_text("# other code", encoding="utf-8")
    assert before != _conditions(asked, space, card)
    assert "definition" not in _conditions(settings_of(tmp_path, metric="f1"), space, card)
