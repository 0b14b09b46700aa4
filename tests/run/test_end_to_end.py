"""Whole runs of the command line on a tiny model: finish, stop, kill, resume."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from budgetsearch.core.decisions import Run
from budgetsearch.core.events import Decided, Planned, SegmentEnded, SegmentStarted
from budgetsearch.machine.detect import detect
from budgetsearch.run.fields import read_hours
from budgetsearch.run.winner import targets_of_base, winner_of
from budgetsearch.storage.ledger import read_entries, read_history
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.simulate.invariants import check
from tests.support.rows import write_rows

HOURS = 0.02  # 72 s
WHOLE_HOURS = 0.04
"""Of the run whose worker is killed: where all is slow its start, the calibration and the next worker's start
take a minute, and then it has to search."""
INTERRUPTED_HOURS = 0.035
"""Of the run that starts three times: each start takes a quarter of a minute where all is slow."""


MIXTURE_HOURS = 0.06
"""Of a run on routed experts, which take their time to be measured where all is slow."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with settings in budgetsearch.yaml, data and a cache."""
    place = tmp_path_factory.mktemp("place")
    write_rows(place / "train.jsonl", 200)
    (place / "space.yaml").write_text(
        "dimensions:\n"
        "  quantization: {kind: choice, values: [fp32, nf4]}\n"
        "  rank: {kind: choice, values: [2, 4, 8], ordered: true}\n"
        "  learning_rate: {kind: float, low: 1.0e-3, high: 3.0e-2, log: true}\n",
        encoding="utf-8",
    )
    (place / "budgetsearch.yaml").write_text(
        f"model: {tiny_model}\ndata: train.jsonl\ngpu: cpu\nspace: space.yaml\n"
        f"hours: {HOURS}\ntask_examples: 8\nmax_length: 128\n",
        encoding="utf-8",
    )
    return place


def command(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start ``budgetsearch`` in the workplace."""
    return subprocess.Popen(
        [sys.executable, "-m", "budgetsearch", *arguments],
        cwd=place,
        env={**os.environ, "BUDGETSEARCH_CACHE": str(place / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until_unused(run: Path) -> None:
    """The orphaned worker holds the run's lock until it has noticed that its driver is gone."""
    deadline = time.monotonic() + 30
    while RunFolder(run).in_use():
        assert time.monotonic() < deadline, "the worker outlived its driver"
        time.sleep(0.1)


def until_segments(ledger: Path, count: int) -> None:
    """Wait until a run has started so many segments."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if ledger.is_file():
            events = [entry.event for entry in read_entries(ledger)]
            if sum(isinstance(event, SegmentStarted) for event in events) >= count:
                return
        time.sleep(0.2)
    raise AssertionError(f"no {count} segments in two minutes")


def check_finished(run: Path) -> None:
    """A finished run keeps its promises: deadline, charges, an adapter that loads, a report."""
    history = read_history(run / "ledger.sqlite")
    assert history.opened is not None
    assert history.spent <= history.opened.budget_seconds
    assert math.isclose(sum(history.charged.values()), history.spent, abs_tol=0.2)
    assert history.running == {}
    assert history.closed is not None
    assert history.closed.state == "finished", history.closed
    assert (run / "report.md").is_file()
    best = history.incumbent
    assert best is not None
    card = json.loads((run / "adapter" / "budgetsearch.json").read_text(encoding="utf-8"))
    assert card["base"]["sha256"]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "adapter" / "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def finished(workplace: Path) -> tuple[Path, str, float]:
    """(run folder, output, seconds from start to exit) of one whole run, whose worker is killed once."""
    start = time.monotonic()
    process = command(workplace, "run", "--out", "runs/whole", "--seed", "1", "--hours", str(WHOLE_HOURS))
    until_segments(workplace / "runs" / "whole" / "ledger.sqlite", 2)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return workplace / "runs" / "whole", output, time.monotonic() - start


def test_a_run_ends_before_its_deadline_with_a_loadable_adapter(finished: tuple[Path, str, float]) -> None:
    """From the start of the command to its exit it stays inside its hours."""
    run, output, seconds = finished
    assert seconds < WHOLE_HOURS * 3600
    assert "kernels-community" not in output  # of kernels that bitsandbytes does not find nobody need know
    check_finished(run)
    history = read_history(run / "ledger.sqlite")
    assert len(history.at_rung(0)) >= 3
    assert history.full_done
    assert history.score is not None
    assert history.score.base_loss is not None
    assert history.score.adapter_loss is not None
    assert history.score.adapter_loss < history.score.base_loss
    assert "adapter" in output


@pytest.mark.slow
def test_the_least_budget_ends_with_an_adapter_and_the_next_try_measures_nothing(workplace: Path) -> None:
    """What is refused names the hours that suffice; half as much again, for this machine is busy, yields a
    scored adapter, twice, and the second time what was measured the first time is used again."""
    words, _ = command(workplace, "run", "--hours", "0.001", "--out", "runs/no").communicate(timeout=60)
    hours = 1.5 * read_hours(words.split("--hours ")[1].split()[0])
    said = ""
    for name in ("least", "again"):
        process = command(workplace, "run", "--hours", f"{hours:.4f}", "--out", f"runs/{name}")
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
        check_finished(workplace / "runs" / name)
    assert "used again; --fresh-calibration measures anew" in said
    history = read_history(workplace / "runs" / "again" / "ledger.sqlite")
    assert any(found.measured for found in history.calibrations.values())


def test_a_killed_worker_is_replaced_and_its_segment_issued_again(
    finished: tuple[Path, str, float],
) -> None:
    """The segments of at most one job crashed (none, if the worker was idle just then), and each was done
    again from where it began, alone."""
    entries = list(read_entries(finished[0] / "ledger.sqlite"))
    ended = [e.event for e in entries if isinstance(e.event, SegmentEnded)]
    lost = [event for event in ended if event.result.status == "crashed"]
    assert len({event.job_id for event in lost}) <= 1
    started = [e.event for e in entries if isinstance(e.event, SegmentStarted)]
    for event in lost:
        mine = [s for s in started if s.segment.trial_id == event.result.trial_id]
        (again,) = [s for s in mine if s.segment.attempt == 1]
        assert again.segment.start_tokens == event.result.tokens
        assert len([s for s in started if s.job_id == again.job_id]) == 1


def test_gangs_are_as_large_as_the_calibration_found_worthwhile(finished: tuple[Path, str, float]) -> None:
    """A tiny model gains from gangs: some form, none is larger than calibrated, and the output says so."""
    history = read_history(finished[0] / "ledger.sqlite")
    entries = list(read_entries(finished[0] / "ledger.sqlite"))
    runs = [e.event.decision for e in entries if isinstance(e.event, Decided)]
    jobs = [decision.job for decision in runs if isinstance(decision, Run)]
    most = {name: found.gang for name, found in history.calibrations.items()}
    assert max(most.values()) > 1
    assert all(len(job.segments) <= most[job.quantization] for job in jobs)
    assert any(len(job.segments) > 1 for job in jobs)
    assert "trials at once" in finished[1]
    assert all(p.peak_bytes > 0 for found in history.calibrations.values() for p in found.probes)


def test_every_decision_of_a_real_run_replays(finished: tuple[Path, str, float]) -> None:
    """The ledger of real training gives the same decisions again."""
    check(list(read_entries(finished[0] / "ledger.sqlite")), WHOLE_HOURS * 3600, replay=True, slack=0.2)


def test_the_exported_adapter_gives_the_reported_loss(
    finished: tuple[Path, str, float], workplace: Path
) -> None:
    """Loaded with plain PEFT on a fresh base, the validation loss is the one in the ledger."""
    from peft import PeftModel

    from budgetsearch.training.bases import load_base
    from budgetsearch.training.data.tokens import open_prepared
    from budgetsearch.training.evaluate import example_losses

    run = finished[0]
    history = read_history(run / "ledger.sqlite")
    assert history.opened is not None
    assert history.score is not None
    prepared = next((workplace / "cache").rglob(history.opened.facts["data"]["prepared"]))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    base = load_base(config["base_model_name_or_path"], history.score.quantization, "cpu")
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    count = len(history.score.adapter_example_losses)
    (losses,) = example_losses(model, open_prepared(prepared).valid, range(count), pad=0, device="cpu")
    assert history.score.adapter_example_losses == pytest.approx(losses, abs=1e-4)


def test_the_study_holds_every_configuration(finished: tuple[Path, str, float]) -> None:
    """Each trial of the ledger is a trial of the Optuna study, with one value per rung."""
    import optuna

    run = finished[0]
    history = read_history(run / "ledger.sqlite")
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{run / 'study.sqlite'}")
    trials = optuna.load_study(
        study_name=study.study_name, storage=f"sqlite:///{run / 'study.sqlite'}"
    ).trials
    assert len(history.trials) == len(trials)
    for trial in trials:
        state = history.trials[trial.user_attrs["trial_id"]]
        assert state.losses == pytest.approx(trial.intermediate_values)
    assert any(t.state == optuna.trial.TrialState.COMPLETE for t in trials)


def test_status_of_a_finished_run(finished: tuple[Path, str, float], workplace: Path) -> None:
    """``status --json`` has at least the documented keys."""
    output, _ = command(workplace, "status", str(finished[0]), "--json").communicate(timeout=60)
    status = json.loads(output)
    assert status["phase"] == "finished"
    assert status["budget_seconds"] == pytest.approx(WHOLE_HOURS * 3600)
    assert 0 < status["spent_seconds"] <= status["budget_seconds"]
    assert len(status["trials"]) >= 3
    assert status["best"]["loss"] is not None


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on_and_does(workplace: Path) -> None:
    """Ctrl-C: code 130, the resume line, a checkpointed segment. A scheduler starts it again and preempts it:
    code 75; resume then finishes in time."""
    run = workplace / "runs" / "interrupted"
    process = command(workplace, "run", "--out", "runs/interrupted", "--hours", str(INTERRUPTED_HOURS))
    until_segments(run / "ledger.sqlite", 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "budgetsearch resume runs/interrupted" in output
    stopped = read_history(run / "ledger.sqlite")
    assert stopped.running == {}
    process = command(
        workplace, "run", "--resume", "auto", "--out", "runs/interrupted", "--hours", str(INTERRUPTED_HOURS)
    )
    until_segments(run / "ledger.sqlite", len(stopped.results) + 1)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "with its own settings" in output
    closed = read_history(run / "ledger.sqlite").closed
    assert closed is not None
    assert (closed.state, closed.signal) == ("interrupted", "SIGUSR1")
    process = command(workplace, "resume", "runs/interrupted")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    check_finished(run)


@pytest.mark.slow
def test_an_interrupted_run_is_reproduced_from_its_manifest(workplace: Path, tmp_path: Path) -> None:
    """Stopped twice, resumed twice, and without ledger and checkpoints: equal to the bit."""
    made = workplace / "runs" / "interrupted" / "manifest.json"
    (tmp_path / "manifest.json").write_bytes(made.read_bytes())
    place = json.loads(made.read_text(encoding="utf-8"))["base"]["path"]
    process = command(
        *(workplace, "reproduce", str(tmp_path / "manifest.json"), "--data", "train.jsonl"),
        *("--model", str(made.parent / place)),
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "reproduced to the bit" in output


def test_a_run_killed_with_signal_9_resumes(workplace: Path) -> None:
    """kill -9 of the driver in the middle of a segment: nothing but that segment is done again, also
    when the resume comes from another folder."""
    run = workplace / "runs" / "killed"
    process = command(workplace, "run", "--out", "runs/killed")
    until_segments(run / "ledger.sqlite", 3)
    process.kill()
    process.communicate(timeout=60)
    before = read_history(run / "ledger.sqlite")
    assert before.closed is None
    wait_until_unused(run)
    output, _ = command(workplace, "status", str(run), "--json").communicate(timeout=60)
    assert json.loads(output)["phase"] == "stopped"
    resumed = subprocess.run(
        [sys.executable, "-m", "budgetsearch", "resume", str(run)],
        cwd="/",
        env={**os.environ, "BUDGETSEARCH_CACHE": str(workplace / "cache")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    output = resumed.stdout + resumed.stderr
    assert resumed.returncode == 0, output
    check_finished(run)
    after = read_history(run / "ledger.sqlite")
    for segment, result in before.results:
        assert (segment, result) in after.results
    plans = [e for e in read_entries(run / "ledger.sqlite") if isinstance(e.event, Planned)]
    assert len(plans) == 1


@pytest.mark.slow
def test_the_hours_that_a_refusal_names_end_with_an_adapter_and_its_base_beside_it(workplace: Path) -> None:
    """However few they are: on a machine whose speed nobody knew the next number may be larger, and is then
    what this machine takes. What a run of so little time trains is compared with its base."""
    seconds, texts = "1s", list[str]()
    for number in range(4):
        run = command(workplace, "run", "--hours", seconds, "--out", f"least{number}", "--fresh-calibration")
        texts.append(run.communicate(timeout=300)[0])
        if run.returncode == 0:
            break
        assert 2 == run.returncode, texts
        assert not (workplace / f"least{number}").exists()
        seconds = " ".join(texts[-1].split()).split("Use --hours ")[1].split()[0]
    assert 0 == run.returncode, texts
    history = read_history(workplace / f"least{number}" / "ledger.sqlite")
    assert history.opened is not None and history.spent <= history.opened.budget_seconds
    assert history.score is not None and history.score.base_loss is not None
    assert (workplace / f"least{number}" / "adapter" / "adapter_model.safetensors").is_file()
    assert "validation loss  base" in texts[-1]


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["by the flag", "by the space"])
def test_a_run_on_a_mixture_brings_adapters_on_its_experts(workplace: Path, asked: str) -> None:
    """From the command to the exported folder, which loads as it was trained."""
    from tests.support.families import build

    model = build("qwen3_moe", workplace / "mixture")
    space, options = workplace / "space.yaml", ["--targets", "experts"]
    if asked == "by the space":
        text = space.read_text(encoding="utf-8")
        space, options = workplace / "experts.yaml", []
        space.write_text(f'{text}  targets: {{kind: choice, values: [experts, "attention,experts"]}}\n')
    run = f"runs/{asked.replace(' ', '-')}"
    process = command(
        workplace,
        "run",
        "--model",
        str(model),
        "--space",
        str(space),
        "--out",
        run,
        "--seed",
        "2",
        "--hours",
        str(MIXTURE_HOURS),
        *options,
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "; routers stay as they are" in output
    check_finished(workplace / run)
    history = read_history(workplace / run / "ledger.sqlite")
    assert {1} == {calibration.gang for calibration in history.calibrations.values()}
    assert history.score is not None and history.score.base_loss is not None
    assert history.score.adapter_loss is not None and history.score.adapter_loss < history.score.base_loss
    config = json.loads((workplace / run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_parameters"]
    served = winner_of(workplace / run)
    assert "experts" in targets_of_base(served.told)
    assert served.load(model, detect("cpu"), False) is not None
