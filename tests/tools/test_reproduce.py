"""A real run's winner trained again from its manifest alone; whatever changed is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as given_by
from hypothesis import strategies as st
from typer.testing import CliRunner

import budgetsearch as bs
from budgetsearch import api
from budgetsearch.cli import app
from budgetsearch.core.errors import UsageError
from budgetsearch.core.events import (
    Closed,
    Exported,
    Opened,
    Planned,
    Resumed,
    SegmentEnded,
    SegmentStarted,
    TrialAdded,
)
from budgetsearch.core.policy.jobs import new_trial
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import Schedule, Score, ScoreJob, Segment, SegmentResult, TrainJob
from budgetsearch.core.reports import Beat, JobEnded
from budgetsearch.engines.local import LocalEngine
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.machine.detect import detect
from budgetsearch.run import session as compose
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.manifest import _chain, _path, write_manifest
from budgetsearch.run.manifest_schema import Manifest, Scores, digest, read
from budgetsearch.run.permissions import Places
from budgetsearch.run.prepare import PACKAGES, Prepared, facts_of, prepare_inputs, worker_setup
from budgetsearch.storage.ledger import Ledger, read_history
from budgetsearch.storage.lock import RunLock
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.reproduce import compare
from budgetsearch.tools.reproduce.bench import Bench, Talk
from budgetsearch.tools.reproduce.replay import NO_COURSE_NOTE, reasons_of, score_rows
from budgetsearch.training.data.models import hashed_files
from budgetsearch.training.data.provenance import file_facts
from tests.support.factories import best_scored, plan, whole_run
from tests.support.rows import write_rows

ROOT = Path(__file__).parents[2]
SECRET = "hunter2"
BATCH = 8
"""Answers asked for: one whole batch, so that the further ones come in the same batches again."""


@dataclass
class MadeRun:
    """A run by hand: a real ledger, worker, exporter, and jobs as the policy might have chosen them."""

    place: Path
    ledger: Ledger = field(init=False)
    jobs: int = 0

    def __post_init__(self) -> None:
        settings = load_settings(
            {
                "model": str(self.place / "base"),
                "data": str(self.place / "train.jsonl"),
                "gpu": "cpu",
                "space": "lora_small",
                "out": str(self.place / "runs" / "mine"),
                "seed": 1,
                "max_length": 128,
                "storage": f"postgresql://me:{SECRET}@host/db",
            },
            cwd=self.place,
        )
        assert settings.out is not None
        self.folder = RunFolder(settings.out)
        self.folder.path.mkdir(parents=True)
        self.folder.prepare(settings.model_dump(mode="json"), self.folder.path.name)
        card = detect("cpu")
        prepared = Prepared(settings, card, *prepare_inputs(settings, lambda line: None))
        facts = facts_of(prepared, self.folder.path.name)
        setup = worker_setup(prepared, self.folder)
        self.engine = LocalEngine(setup, self.folder.worker_log)
        self.ledger, self.clock = Ledger(self.folder.ledger), VirtualClock()
        self.add(
            Opened(720.0, settings.model_dump(mode="json"), facts),
            Planned(plan(eval_examples=6, task_examples=BATCH)),
        )
        self.exporter = compose.exporter_of(self.folder, self.ledger.history.opened, prepared.base.path)

    def add(self, *events: Any) -> None:
        """Append events."""
        for event in events:
            self.clock.advance(1.0)
            self.ledger.append(event, self.clock)

    def trial(self, rank: int, rate: float, dropout: float = 0.05) -> int:
        """Add a configuration; returns its number."""
        number = len(self.ledger.history.trials)
        params = {"quantization": "fp32", "rank": rank, "learning_rate": rate, "dropout": dropout}
        assert self.ledger.history.plan is not None
        self.add(TrialAdded(new_trial(self.ledger.history.plan, number, Proposal(params, "prior"))))
        return number

    def segment(self, number: int, stop: int, schedule: Schedule, **changes: Any) -> Segment:
        """The next segment of a trial."""
        state = self.ledger.history.trials[number]
        segment = Segment(
            trial_id=number,
            params=state.trial.params,
            seed=state.trial.seed,
            rung=0,
            start_tokens=state.tokens,
            stop_tokens=stop,
            schedule=schedule,
            batch_size=8,
            micro_batch=4,
            checkpoint_in=state.checkpoint,
        )
        return replace(segment, **changes)

    def run(self, *segments: Segment, stop_early: bool = False) -> list[SegmentResult]:
        """One job, as a driver records it; ``stop_early`` cancels it at its first sign of life."""
        job = TrainJob(self.jobs, segments, 6, 600.0)
        self.jobs += 1
        for segment in segments:
            self.add(SegmentStarted(job.job_id, segment))
        self.engine.submit(job)
        cancel = (lambda: self.engine.cancel(job.job_id)) if stop_early else (lambda: None)
        for result in self.reports(job.job_id, cancel):
            self.add(SegmentEnded(job.job_id, result))
        return [result for _, result in self.ledger.history.results[-len(segments) :]]

    def reports(self, job_id: int, on_beat: Callable[[], None] = lambda: None) -> Sequence[Any]:
        """The results of a job."""
        for _ in range(1200):
            for report in self.engine.poll(0.5):
                if isinstance(report, Beat):
                    on_beat()
                if isinstance(report, JobEnded):
                    return report.results
        raise AssertionError(f"job {job_id} never ended")

    def finish(self) -> None:
        """Score, export, close, and write the manifest."""
        best = self.ledger.history.incumbent
        assert best is not None
        job = ScoreJob(self.jobs, "fp32", str(best.best_checkpoint), 6, 0, 4, 600.0)
        answers = replace(job, job_id=self.jobs + 1, eval_examples=0, task_examples=BATCH, further=True)
        for one in (job, answers):
            self.engine.submit(one)
            self.add(*(best_scored(self.ledger.history, score) for score in self.reports(one.job_id)))
        path = self.exporter.export(self.ledger.history, best, final=True)
        self.add(Exported(best.trial_id, str(best.best_checkpoint), path, True))
        self.add(Closed("finished", "by hand"))
        self.engine.close()
        self.ledger.close()
        written = write_manifest(self.folder, read_history(self.folder.ledger))
        assert self.folder.path / "manifest.json" == written


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this module's own."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUDGETSEARCH_CACHE", str(path))
        yield path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> MadeRun:
    """The winner went through a gang of three, was paused, promoted beside another that had been trained
    before, stopped in its full run, and went on to an end that had moved."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_model, place / "base")
    write_rows(place / "train.jsonl", 160)
    run = MadeRun(place)
    try:
        for rank, rate in ((4, 1e-2), (2, 3e-3), (8, 5e-3)):
            run.trial(rank, rate)
        first = Schedule(300, 1500)
        run.run(*(run.segment(n, stop, first) for n, stop in ((0, 1500), (1, 1100), (2, 1300))))
        second = Schedule(300, 2600)
        run.run(*(run.segment(n, stop, second, rung=1) for n, stop in ((1, 2600), (0, 2400))))
        full = {"rung": 2, "evaluate": False}
        (cut,) = run.run(run.segment(0, 10**9, Schedule(300, 10**9, 1200), **full), stop_early=True)
        assert cut.status == "cancelled"
        end = cut.tokens + 3000
        run.run(run.segment(0, cut.tokens + 1500, Schedule(300, end, 2000), **full))
        run.run(run.segment(0, end, Schedule(300, end, 1800), rung=2))
        run.finish()
    finally:
        run.engine.close()
    return run


@pytest.fixture
def copy(made: MadeRun, tmp_path: Path) -> Path:
    """The whole place, to be changed: base, data, and the run in it."""
    shutil.copytree(made.place, tmp_path / "place")
    return tmp_path / "place" / "runs" / "mine"


def flip(path: Path, where: int = -2) -> None:
    """Change one byte, and leave size and time as they were."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def invoke(*arguments: object) -> tuple[int, str]:
    """(exit code, everything that was printed)."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


# -------------------------------------------------------------------------- the manifest


def test_the_manifest_tells_the_winners_whole_way(made: MadeRun) -> None:
    """Five links, the neighbours of each, actual tokens, both ends of the schedule, and the losses."""
    manifest = read(made.folder.path).manifest
    assert manifest.adapter.trial_id == 0
    assert [3, 2, 1, 1, 1] == [len(link.segments) for link in manifest.training]
    assert ["ok", "ok", "cancelled", "ok", "ok"] == [link.status for link in manifest.training]
    ends = [next(s for s in link.segments if s["trial_id"] == 0) for link in manifest.training]
    assert [0, *(link.tokens for link in manifest.training[:-1])] == [s["start_tokens"] for s in ends]
    assert ends[2]["schedule"]["stop_tokens"] != ends[3]["schedule"]["stop_tokens"]
    assert manifest.adapter.tokens == manifest.training[-1].tokens
    assert manifest.scores is not None
    assert (True, 6, manifest.data.valid.stats["rows"]) == (
        manifest.scores.final,
        len(manifest.scores.base_example_losses),
        manifest.scores.task_examples,
    )
    assert {"torch", "processor", "threads"} <= set(manifest.training[0].computed_on)
    assert manifest.versions["torch"]
    anatomy = manifest.base.anatomy
    assert anatomy is not None
    assert anatomy["layers"]["q_proj"] > 0
    assert {"class", "covered", "quantized"} <= set(anatomy)
    card = (made.folder.adapter / "README.md").read_text(encoding="utf-8")
    assert f"{anatomy['layers']['q_proj']} x q_proj" in card


def test_no_password_and_no_absolute_path_of_an_input(made: MadeRun) -> None:
    """Paths are seen from the run folder; the storage is only a kind of database."""
    text = (made.folder.path / "manifest.json").read_text(encoding="utf-8")
    assert SECRET not in text
    assert str(made.place) not in text
    manifest = read(made.folder.path).manifest
    assert ("base", "../../base") == (manifest.base.source, manifest.base.path)
    assert ("train.jsonl", "../../train.jsonl") == (
        manifest.data.sources[0].source,
        manifest.data.sources[0].path,
    )
    assert manifest.settings["storage"] == "postgresql"
    assert set(PACKAGES) <= set(manifest.versions)


@pytest.mark.parametrize("source", ["proj/train.jsonl", "proj/runs/mine/train.jsonl", "linked/train.jsonl"])
@pytest.mark.parametrize("run", ["proj/runs/mine", "proj/runs/link", "other/link", "linked/runs/mine"])
def test_a_path_leads_to_the_input_through_links(tmp_path: Path, run: str, source: str) -> None:
    """Whatever names the run and the input had, from the folder itself and over a link to it; what is
    inside the folder, or the project, is named without what lies above, so it may move."""
    (tmp_path / "proj" / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for link in ("proj/runs/link", "other/link"):
        (tmp_path / link).symlink_to(tmp_path / "proj" / "runs" / "mine")
    (tmp_path / "linked").symlink_to(tmp_path / "proj")
    (tmp_path / source).write_text("x", encoding="utf-8")
    found = _path(str(tmp_path / source), tmp_path / run)
    assert found is not None
    for name in ("proj/runs/mine", run):
        assert (tmp_path / name / found).samefile(tmp_path / source)
    assert ("train.jsonl" if "mine" in source else "../../train.jsonl") == found
    (tmp_path / "proj").rename(tmp_path / "moved")
    (tmp_path / "linked").unlink()
    moved = tmp_path / "moved" / Path(source).relative_to(Path(source).parts[0])
    assert (tmp_path / "moved" / "runs" / "mine" / found).samefile(moved)


def test_a_run_whose_folder_is_a_link_is_verified_and_reproduced(copy: Path, tmp_path: Path) -> None:
    """The folder lies on another disk, say, and the manifest was written from there."""
    disk = tmp_path / "disk" / "deep" / "down"
    disk.mkdir(parents=True)
    copy.rename(disk / "mine")
    copy.symlink_to(disk / "mine")
    for name in ("manifest.json", "adapter/manifest.json"):
        body = json.loads((copy / name).read_text(encoding="utf-8"))
        body["base"]["path"] = _path(str(tmp_path / "place" / "base"), copy)
        body["data"]["sources"][0]["path"] = _path(str(tmp_path / "place" / "train.jsonl"), copy)
        (copy / name).write_text(json.dumps({**body, "sha256": digest(body)}), encoding="utf-8")
    for run in (copy, disk / "mine", copy / "adapter"):
        assert [] == [finding for finding in api.verify(run, score=False).findings if not finding.well]


def test_the_schema_in_the_docs_is_the_code_s() -> None:
    """docs/manifest.schema.json is what pydantic makes of the classes."""
    written = json.loads((ROOT / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
    assert Manifest.model_json_schema() == written


def test_a_manifest_is_not_written_again_over_what_was_changed(copy: Path) -> None:
    """A finished run that is resumed keeps its manifest: a changed adapter must not become the true one."""
    before = (copy / "manifest.json").read_bytes()
    flip(copy / "adapter" / "adapter_model.safetensors")
    write_manifest(RunFolder(copy), read_history(copy / "ledger.sqlite"))
    assert before == (copy / "manifest.json").read_bytes()


def test_an_adapter_that_the_ledger_does_not_know_gets_no_manifest(copy: Path) -> None:
    """The ledger lost its end: the adapter of a later trial is not described as that of an earlier one."""
    (copy / "manifest.json").unlink()
    told = copy / "adapter" / "budgetsearch.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "checkpoint": "trial0007-rung0"}))
    assert write_manifest(RunFolder(copy), read_history(copy / "ledger.sqlite")) is None
    assert not (copy / "manifest.json").exists()


def test_a_chain_leaves_out_what_trained_nothing() -> None:
    """A segment that gave back the checkpoint it came with is no link; a lost checkpoint is an error."""
    story = whole_run()
    best = story.history.incumbent
    assert best is not None
    tokens = [story.history.results[i][1].tokens for i in _chain(story.history, str(best.best_checkpoint))]
    assert sorted(tokens) == tokens
    segment, result = story.history.results[-1]
    idle = replace(segment, checkpoint_in=result.checkpoint_out)
    story.history.results.append((idle, replace(result, status="cancelled")))
    again = [story.history.results[i][1].tokens for i in _chain(story.history, str(best.best_checkpoint))]
    assert tokens == again


@pytest.mark.parametrize(
    ("text", "why"),
    [("{", "cannot be read"), ('{"format": 99}', "newer"), ('{"format": 1}', "cannot"), ("[]", "cannot")],
)
def test_a_manifest_that_cannot_be_read_is_wrong_input(tmp_path: Path, text: str, why: str) -> None:
    """Exit code 2, and the message says what is wrong; so without any."""
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    for command in ("reproduce", "verify"):
        code, output = invoke(command, tmp_path)
        assert code == 2
        assert why in output
    (tmp_path / "manifest.json").unlink()
    code, output = invoke("verify", tmp_path)
    assert (2, True) == (code, "has no manifest.json" in output)


# ------------------------------------------------------------------------------ training again


def test_the_winner_is_trained_again_from_the_manifest_alone(
    made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing but the manifest, the base and the data: the adapter is equal to the bit, every loss and the
    accuracy are the same, and the reproduced adapter is where it was wanted."""
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))
    shutil.copy(made.folder.path / "manifest.json", tmp_path / "manifest.json")
    shutil.copytree(made.place / "base", tmp_path / "moved")
    shutil.copy(made.place / "train.jsonl", tmp_path / "other.jsonl")
    caplog.set_level("INFO", "budgetsearch")
    outcome = api.reproduce(
        tmp_path / "manifest.json",
        out=tmp_path / "again",
        places=Places(data=str(tmp_path / "other.jsonl"), model=str(tmp_path / "moved")),
    )
    assert outcome.reasons == ()
    assert [True] * 9 == [row.agrees for row in outcome.rows], outcome.rows
    assert (True, True) == (outcome.agrees, outcome.exact)
    assert any("beside 2 others: tokens 0 to" in line for line in caplog.messages)
    weights = [f / "adapter_model.safetensors" for f in (tmp_path / "again", made.folder.adapter)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert {"adapter_config.json", "tokenizer.json", "reproduction.json"} <= {
        path.name for path in (tmp_path / "again").iterdir()
    }


@pytest.mark.slow
def test_alone_it_agrees_within_the_tolerance_and_says_why(made: MadeRun) -> None:
    """Same tokens, other rounding: the losses agree to 0.5%, the tensors are only shown."""
    code, output = invoke("reproduce", made.folder.path, "--alone", "--json")
    outcome = json.loads(output[output.index("{") :])
    assert code == 0, output
    assert (True, False) == (outcome["agrees"], outcome["exact"])
    assert any("--alone" in reason for reason in outcome["reasons"])
    rows = {row["what"]: row for row in outcome["rows"]}
    assert rows["adapter tensors"]["agrees"] is None
    assert "of the norm" in rows["adapter tensors"]["difference"]
    assert rows["validation loss of the adapter"]["tolerance"] == "0.50%"


def test_ctrl_c_leaves_nothing(made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a half adapter nor a folder of checkpoints; the exit code is that of Ctrl-C."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def interrupted(*arguments: Any) -> Any:
        assert list(tmp_path.glob("budgetsearch-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "train", interrupted)
    code, output = invoke("reproduce", made.folder.path, "--out", tmp_path / "again")
    assert (130, True) == (code, "nothing was kept" in output)
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("../../train.jsonl", "data train.jsonl changed"),
        ("../../base/model.safetensors", "base model.safetensors changed"),
        ("../../base/tokenizer.json", "base tokenizer.json changed"),
        ("adapter/adapter_model.safetensors", "adapter adapter_model.safetensors changed"),
        ("adapter/tokenizer_config.json", "adapter tokenizer_config.json changed"),
    ],
)
def test_a_changed_byte_is_named(copy: Path, name: str, what: str) -> None:
    """By ``verify`` with both hashes; by ``reproduce`` as well where it is an input, before it trains."""
    flip(copy / name)
    code, output = invoke("verify", copy, "--no-score")
    flat = " ".join(output.split())
    assert code == 1
    assert what in flat
    assert "expected" in flat
    if name.startswith(".."):
        code, output = invoke("reproduce", copy)
        assert (2, True) == (code, what in " ".join(output.split()))


def test_a_changed_row_is_named(copy: Path) -> None:
    """Another answer in a file that still parses: by the file's hash and by that of the rows."""
    data = copy / "../../train.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), "answer": "purple"})
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = {finding.what: finding for finding in api.verify(copy, score=False).findings if not finding.well}
    assert "changed" == found.pop("data train.jsonl").state
    assert {"changed"} == {finding.state for finding in found.values()}
    assert set(found) <= {"training rows", "validation rows"}
    assert found
    assert all("sha256" in finding.detail for finding in found.values())


def cut(path: Path) -> None:
    """Leave half of a file."""
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"])
def test_a_file_of_the_adapter_that_is_cut_off_or_gone_is_named(
    copy: Path, name: str, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1; an adapter that is not what it was is not loaded to score it."""
    monkeypatch.setattr(Bench, "score", lambda *_: pytest.fail("loaded"))
    damage(copy / "adapter" / name)
    code, output = invoke("verify", copy)
    flat = " ".join(output.split())
    assert code == 1, output
    assert f"adapter {name} {'changed' if damage is cut else 'missing'}" in flat
    assert "scores unchecked" in flat


def test_an_adapter_that_is_gone_is_named_file_by_file(copy: Path) -> None:
    """With the manifest's copy that went with it."""
    shutil.rmtree(copy / "adapter")
    lost = {finding.what for finding in api.verify(copy).findings if finding.state == "missing"}
    assert {"adapter adapter_model.safetensors", "adapter tokenizer.json", "adapter/manifest.json"} <= lost


@pytest.mark.parametrize(("damage", "state"), [(cut, "damaged"), (Path.unlink, "missing")])
@pytest.mark.parametrize("name", ["manifest.json", "adapter/manifest.json"])
def test_a_manifest_that_is_cut_off_or_gone_is_named(
    copy: Path, name: str, damage: Callable[[Path], None], state: str
) -> None:
    """The other one stands in, and all that it names is checked: nothing else is wrong."""
    damage(copy / name)
    outcome = api.verify(copy, score=False)
    assert [(name, state)] == [(f.what, f.state) for f in outcome.findings if not f.well]
    assert {"ledger.sqlite", "training rows", "adapter adapter_model.safetensors"} <= {
        finding.what for finding in outcome.findings if finding.state == "unchanged"
    }
    damage(copy / ("adapter/manifest.json" if name == "manifest.json" else "manifest.json"))
    assert invoke("verify", copy)[0] == 2


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("notes.txt", 0),
        ("model.safetensors", 0),
        ("x.py", 1),
        ("adapter_model.bin", 1),
        ("X.PT", 1),
        ("a.pkl", 1),
    ],
)
def test_what_was_not_exported_is_named(copy: Path, name: str, code: int) -> None:
    """A note; but what can run code fails. Nothing is said of other things beside a lone manifest."""
    (copy / "adapter" / name).write_bytes(b"x")
    found, output = invoke("verify", copy, "--no-score")
    assert code == found, output
    assert f"adapter {name} {'new' if code else 'noted'}" in output
    (copy / "adapter" / "adapter_model.safetensors").rename(copy.parent / "adapter_model.safetensors")
    (copy / "adapter" / "adapter_config.json").unlink()
    places = Places(str(copy / "../../base"), str(copy / "../../train.jsonl"))
    assert not [
        finding
        for finding in api.verify(copy / "adapter" / "manifest.json", score=False, places=places).findings
        if finding.what == f"adapter {name}"
    ]


def test_a_changed_manifest_is_named(copy: Path) -> None:
    """Whatever stands in it: its own hash tells, and its copy beside the adapter."""
    path = copy / "manifest.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"seed": 1', '"seed": 2'), encoding="utf-8")
    code, output = invoke("verify", copy, "--no-score")
    assert code == 1
    assert "manifest.json changed" in output
    code, output = invoke("reproduce", copy)
    assert (2, True) == (code, "manifest.json changed" in output)


def test_what_is_not_there_is_named_with_the_flag(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and base that moved away, and a ledger that has gone on."""
    monkeypatch.chdir(copy)
    (copy / "../../train.jsonl").rename(copy / "../../moved.jsonl")
    code, output = invoke("reproduce", copy)
    assert (2, True) == (code, "--data" in output)
    shutil.rmtree(copy / "../../base")
    code, output = invoke("verify", copy, "--no-score", "--data", copy / "../../moved.jsonl")
    assert (1, True) == (code, "--model" in output)
    ledger = Ledger(copy / "ledger.sqlite")
    segment, result = ledger.history.results[-1]
    clock = VirtualClock(1e6)
    ledger.append(SegmentStarted(77, segment), clock)
    ledger.append(SegmentEnded(77, result), clock)
    ledger.close()
    _, output = invoke("verify", copy, "--no-score")
    assert "6 segments instead of" not in output
    assert "budgetsearch resume RUN" in " ".join(output.split())


def flip_last_event(path: Path) -> None:
    """Change a byte in the text of the last event, in a database or in a line."""
    flip(path, path.read_bytes().rindex(b"by hand"))


LEDGERS = ("ledger.sqlite", "ledger.jsonl")


@pytest.mark.parametrize(("damage", "state"), [
    (flip_last_event, "damaged"), (cut, "damaged"), (lambda path: os.truncate(path, 0), "damaged"),
    (lambda path: os.truncate(path, path.stat().st_size - 1), "damaged"), (Path.unlink, "missing"),
])  # fmt: skip
@pytest.mark.parametrize("name", LEDGERS)
def test_a_ledger_or_a_backup_that_is_not_whole_is_named(
    copy: Path, name: str, damage: Callable[[Path], None], state: str
) -> None:
    """The other one tells the manifest's story all the same; the run is not called verified."""
    damage(copy / name)
    code, output = invoke("verify", copy, "--no-score", "--json")
    outcome = json.loads(output[output.index("{") :])
    assert [(name, state)] == [
        (f["what"], f["state"]) for f in outcome["findings"] if f["state"] != "unchanged"
    ]
    assert (1, False) == (code, outcome["passes"])
    assert "budgetsearch resume" in next(f["detail"] for f in outcome["findings"] if f["what"] == name)


def test_ledgers_of_which_nothing_is_left_are_named(copy: Path) -> None:
    """Damaged beyond reading, then gone."""
    for name in LEDGERS:
        (copy / name).write_bytes(b"nothing")
    found = [finding for finding in api.verify(copy, score=False).findings if not finding.well]
    assert [("ledger.sqlite", "damaged")] == [(finding.what, finding.state) for finding in found]
    for name in LEDGERS:
        (copy / name).unlink()
    found = [finding for finding in api.verify(copy, score=False).findings if not finding.well]
    assert [("ledger.sqlite", "missing")] == [(finding.what, finding.state) for finding in found]


def test_a_run_that_is_going_is_said_to_be(copy: Path) -> None:
    """Its ledger is ahead of the manifest, and its backup may be a line behind: that is no damage."""
    ledger, clock = Ledger(copy / "ledger.sqlite"), VirtualClock(1e6)
    segment, result = ledger.history.results[-1]
    for event in (Resumed(), SegmentStarted(77, segment), SegmentEnded(77, result)):
        ledger.append(event, clock)
    ledger.close()
    backup = copy / "ledger.jsonl"
    os.truncate(backup, backup.read_bytes().rindex(b"\n", 0, -1) + 1)
    lock = RunLock(copy)
    try:
        found = [finding for finding in api.verify(copy, score=False).findings if not finding.well]
        for name in ("manifest.json", "adapter/manifest.json"):
            (copy / name).unlink()
        for command in ("verify", "reproduce"):
            code, output = invoke(command, copy)
            assert (2, True) == (code, "is still going" in " ".join(output.split()))
    finally:
        lock.release()
    assert [("ledger.sqlite", "changed")] == [(finding.what, finding.state) for finding in found]
    assert "still going" in found[0].detail


def test_verify_passes_on_a_run_and_on_its_adapter(made: MadeRun, tmp_path: Path) -> None:
    """Every hash, the ledger, and the scores to the bit; an adapter that travels needs only its inputs."""
    code, output = invoke("verify", made.folder.path, "--json")
    outcome = json.loads(output[output.index("{") :])
    assert code == 0, output
    assert outcome["passes"]
    assert {"unchanged"} == {finding["state"] for finding in outcome["findings"]}
    assert {"manifest.json", "ledger.sqlite", "training rows"} <= {f["what"] for f in outcome["findings"]}
    assert [True] * 6 == [row["agrees"] for row in outcome["rows"]]
    shutil.copytree(made.folder.adapter, tmp_path / "travelled")
    places = ("--model", made.place / "base", "--data", made.place / "train.jsonl")
    code, output = invoke("verify", tmp_path / "travelled", "--no-score", *places)
    assert (0, True) == (code, output.strip().endswith("verified"))


@pytest.mark.slow
def test_a_run_that_was_moved_finds_its_adapter(copy: Path, made: MadeRun, tmp_path: Path) -> None:
    """Status, reports, the Python API and verify name the place where it lies now, and no other. What
    ``resume`` exports again after somebody has deleted it is the same adapter."""
    copy.parents[1].rename(tmp_path / "elsewhere")
    run = tmp_path / "elsewhere" / "runs" / "mine"
    adapter = run / "adapter"
    study = f"sqlite:///{tmp_path / 'study.sqlite'}"
    shutil.rmtree(adapter)
    assert bs.open(run).adapter_path is None
    assert adapter == bs.resume(run, progress=False, storage=study).adapter_path
    assert adapter == bs.open(run).adapter_path
    assert str(adapter) == bs.open(run).status["best"]["adapter_path"]
    answer = json.loads(bs.open(run).report().json.read_text(encoding="utf-8"))["answer"]
    assert str(adapter) == answer["best"]["adapter_path"]
    assert any(str(adapter) in line for line in answer["loading"])
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (made.folder.adapter / name).read_bytes() == (adapter / name).read_bytes()
    assert api.verify(run).passes


@pytest.fixture
def with_code(made: MadeRun, tmp_path: Path) -> Path:
    """An adapter that travelled, of a run that let code of its base run; ``ran`` says that it has. Base and
    data lie beside it."""
    shutil.copytree(made.folder.adapter, tmp_path / "travelled")
    base = Path(shutil.copytree(made.place / "base", tmp_path / "base"))
    shutil.copy(made.place / "train.jsonl", tmp_path / "train.jsonl")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "theirs.TheirModel"}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (base / "theirs.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n\n\n"
        "class TheirModel(LlamaForCausalLM):\n    pass\n",
        encoding="utf-8",
    )
    path = tmp_path / "travelled" / "manifest.json"
    body = json.loads(path.read_text(encoding="utf-8"))
    body["settings"]["trust_remote_code"] = True
    body["base"]["files"] = [file_facts(file) for file in hashed_files(base, code=True)]
    path.write_text(json.dumps({**body, "sha256": digest(body)}), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("command", ["verify", "reproduce"])
def test_a_strangers_code_runs_only_where_it_is_allowed(with_code: Path, command: str) -> None:
    """Without the flag: exit code 2, and the message names the run, the model and the flag. With it, but with
    a changed line of code: the change is named, and nothing is loaded."""
    places = ("--model", with_code / "base", "--data", with_code / "train.jsonl")
    code, output = invoke(command, with_code / "travelled", *places)
    flat = " ".join(output.split())
    assert code == 2
    assert {True} == {part in flat for part in (str(with_code / "travelled"), "base", "--trust-remote-code")}
    flip(with_code / "base" / "theirs.py", -3)
    anyway = ("--anyway",) if command == "reproduce" else ()
    code, output = invoke(command, with_code / "travelled", *places, "--trust-remote-code", *anyway)
    assert (1 if command == "verify" else 2) == code
    assert "base theirs.py changed" in output
    assert "not loaded" in output
    assert not (with_code / "ran").exists()


@pytest.mark.slow
def test_code_that_is_allowed_and_unchanged_runs(with_code: Path) -> None:
    """The flag does what it says: the base is loaded by its own code, and all of it agrees."""
    outcome = api.verify(
        with_code / "travelled",
        places=Places(str(with_code / "base"), str(with_code / "train.jsonl"), trust_remote_code=True),
    )
    assert outcome.passes, outcome
    assert {"base theirs.py"} <= {finding.what for finding in outcome.findings}
    assert (with_code / "ran").exists()


def test_a_base_that_has_changed_is_not_loaded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even its tokenizer: ``verify`` names the change and says what it left out."""

    def loaded(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("loaded")

    flip(copy / "../../base/tokenizer.json")
    monkeypatch.setattr("budgetsearch.tools.reproduce.inputs.prepare_inputs", loaded)
    monkeypatch.setattr(Bench, "score", loaded)
    found = {finding.what: finding.state for finding in api.verify(copy).findings}
    assert ("changed", "unchecked") == (found["base tokenizer.json"], found["rows and scores"])


def test_an_adapter_that_scores_otherwise_is_found(copy: Path) -> None:
    """Even if its hashes in the manifest were made to fit: the losses tell."""
    from safetensors.torch import load_file, save_file

    file = copy / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor * 1.5 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for path in (copy / "manifest.json", copy / "adapter" / "manifest.json"):
        body = json.loads(path.read_text(encoding="utf-8"))
        facts = file_facts(file)
        body["adapter"]["files"] = [facts if f["name"] == file.name else f for f in body["adapter"]["files"]]
        path.write_text(json.dumps({**body, "sha256": digest(body)}), encoding="utf-8")
    outcome = api.verify(copy)
    assert all(finding.well for finding in outcome.findings), outcome.findings
    assert not outcome.passes
    wrong = {row.what for row in outcome.rows if row.agrees is False}
    assert {"validation loss of the adapter", "each example's, adapter"} <= wrong
    assert "validation loss of the base" not in wrong


def test_other_versions_threads_and_cards_are_reasons(made: MadeRun) -> None:
    """Each is named with what it was and what it is; none where nothing differs."""
    manifest = read(made.folder.path).manifest

    def results(**changes: str) -> list[SegmentResult]:
        return [
            SegmentResult(0, 0, "ok", link.tokens, computed_on={**link.computed_on, **changes})
            for link in manifest.training
        ]

    assert [] == reasons_of(manifest, results(), alone=False)
    older = manifest.model_copy(update={"versions": {**manifest.versions, "torch": "1.0"}})
    torch_now = manifest.versions["torch"]
    assert [f"torch: 1.0 then, {torch_now} now"] == reasons_of(older, results(), alone=False)
    threads = manifest.training[0].computed_on["threads"]
    assert [f"threads: {threads} then, 64 now"] == reasons_of(manifest, results(threads="64"), alone=False)
    card = manifest.model_copy(update={"card": {**manifest.card, "device": "cuda:0"}})
    assert any("no fixed order" in reason for reason in reasons_of(card, results(), alone=False))
    links = [link.model_copy(update={"course": ()}) for link in manifest.training]
    untold = manifest.model_copy(update={"training": tuple(links)})
    assert [NO_COURSE_NOTE] == reasons_of(untold, results(), alone=False)


@pytest.mark.parametrize(("answers", "first", "binds"), [(24, 8, True), (5, 6, True), (29, 5, None)])
def test_answers_in_other_batches_do_not_bind(answers: int, first: int, binds: bool | None) -> None:
    """Further answers began with a batch of their own; where that is another one now, a greedy answer may
    turn, so the accuracy is only shown."""
    known = Scores(
        final=True, quantization="fp32", micro_batch=4, base_loss=1.0, adapter_loss=0.5,
        base_example_losses=(1.0,), adapter_example_losses=(0.5,), adapter_accuracy=0.5,
        task_examples=answers, first_answers=first,
    )  # fmt: skip
    score = Score("ok", "fp32", 1.0, 0.5, (1.0,), (0.5,), adapter_accuracy=0.5, task_examples=answers)
    assert binds is score_rows(known, score, exact=True, tolerance=None)[-1].agrees


def test_an_existing_folder_is_not_overwritten(made: MadeRun, tmp_path: Path) -> None:
    """Wrong input is found before anything is done."""
    with pytest.raises(UsageError, match="exists already"):
        api.reproduce(made.folder.path, out=tmp_path)
    assert Places() == Places(None, None, None)


@pytest.mark.parametrize("out", ["file/again", "link", "/proc/again"])
def test_an_out_that_cannot_be_made_is_found_before_it_trains(
    made: MadeRun, tmp_path: Path, out: str
) -> None:
    """Below a file, over a dead link, on a disk that takes nothing: exit code 2, and no trace."""
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    code, output = invoke("reproduce", made.folder.path, "--out", tmp_path / out)
    assert (2, True) == (code, "--out" in output)
    assert "training trial" not in output
    assert before == sorted(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["verify", "reproduce"])
@pytest.mark.parametrize("value", ["-0.1", "nan", "7"])
def test_a_tolerance_that_is_no_share_is_refused(made: MadeRun, command: str, value: str) -> None:
    """Exit code 2 before anything is read: with a negative one nothing could agree, with nan neither."""
    code, output = invoke(command, made.folder.path, f"--tolerance={value}")
    assert (2, True) == (code, "--tolerance must be a share" in output)


# ----------------------------------------------------------------------------- comparing

FINITE = st.floats(1e-3, 1e3)


@given_by(FINITE, FINITE, st.sampled_from(list(compare.TOLERANCES)))
def test_a_loss_agrees_within_its_share(expected: float, found: float, quantization: str) -> None:
    """Equal ones always do, also exactly; others if and only if they are near enough."""
    allowed = compare.tolerance_of(quantization, exact=False)
    row = compare.loss_row("loss", expected, found, allowed)
    assert row is not None
    assert row.agrees == (abs(found - expected) <= allowed * expected or expected == found)
    strict = compare.loss_row("loss", expected, found, compare.tolerance_of(quantization, exact=True))
    assert strict is not None
    assert strict.agrees == (expected == found)


@pytest.mark.parametrize("found", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_never_agrees(found: float) -> None:
    """However wide the tolerance."""
    row = compare.loss_row("loss", 1.0, found, 0.9)
    assert row is not None
    assert row.agrees is False
    other = compare.examples_row("each", [1.0], [found], exact=False)
    assert other is not None
    assert other.agrees is False


@given_by(st.lists(FINITE, min_size=1, max_size=8), st.lists(FINITE, min_size=1, max_size=8), st.booleans())
def test_example_losses(expected: list[float], found: list[float], exact: bool) -> None:
    """Other numbers of them never agree; the worst row is named; exactly means every one."""
    row = compare.examples_row("each", expected, found, exact=exact)
    assert row is not None
    if len(expected) != len(found):
        assert row.agrees is False
    elif exact:
        assert row.agrees == (expected == found)
    else:
        assert row.agrees is None
    if len(expected) == len(found) and expected != found:
        apart = [abs(a - b) for a, b in zip(expected, found, strict=True)]
        assert f"in row {apart.index(max(apart))}" in row.difference


@given_by(st.dictionaries(st.sampled_from("abc"), st.sampled_from("12")), st.dictionaries(
    st.sampled_from("abc"), st.sampled_from("12")))  # fmt: skip
def test_changes_are_named_once_each(expected: dict[str, str], found: dict[str, str]) -> None:
    """One sentence for each name whose value differs, none where nothing does."""
    lines = compare.changes(expected, found)
    assert sum(expected.get(n) != found.get(n) for n in "abc") == len(lines)
    assert [] == compare.changes(expected, expected)


def test_accuracies_bind_only_where_all_is_equal() -> None:
    """And are passed over where none was measured."""
    assert compare.accuracy_row("a", None, 0.5, 0, exact=True) is None
    rows = [compare.accuracy_row("a", 0.5, 0.25, 4, exact=exact) for exact in (True, False)]
    assert [False, None] == [row and row.agrees for row in rows]
    assert rows[0] is not None
    assert ("a (n = 4)", "-25.0%") == (rows[0].what, rows[0].difference)
    assert not compare.agree([rows[0]])
    assert not compare.agree([compare.equal_row("x", "1", "2")])


def test_progress_is_told_now_and_then_with_the_seconds_left() -> None:
    """At the pace of this machine, however fast the run's was."""
    now, said = [0.0], list[str]()
    talk = Talk(said.append, 100.0, now=lambda: now[0])
    beat = Beat(1, 0, "train", 10, 0.5)
    talk.hear(beat, "segment 1", 50.0, 0.5)
    assert said == []
    now[0] = 50.0
    talk.hear(beat, "segment 1", 50.0, 0.5)
    assert ["segment 1, training loss 0.5000, about 150 s left"] == said


def test_a_score_keeps_where_it_was_computed() -> None:
    """Joined with the answers' score it is still the losses'."""
    losses = Score("ok", "fp32", base_loss=1.0, computed_on={"threads": "2"})
    assert {"threads": "2"} == losses.joined(Score("ok", "fp32", task_examples=1)).computed_on
