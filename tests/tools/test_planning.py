"""``budgetsearch plan``: what fits and what the hours buy, without a card, a network or torch."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import budgetsearch
from budgetsearch.cli import app
from budgetsearch.core.errors import BudgetError, DeviceError, ModelError, UsageError
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.resources.memory import DOUBT
from budgetsearch.machine.configs import find_config, known_models
from budgetsearch.machine.profiles import PROFILES
from budgetsearch.machine.shapes import shape_of
from budgetsearch.run.guesses import TrainedWith, guess_calibration
from budgetsearch.tools.plan.preview import Preview
from budgetsearch.tools.plan.show import clock, show
from budgetsearch.training.data.frame import WAIT_SECONDS, Frame, frame_of
from budgetsearch.training.data.size import Reading, guess_data
from tests.support.fake_nvml import FakeNvml, card
from tests.support.rows import write_rows

BIG = ("Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.1", "Qwen/Qwen-14B")
CARDS = [name for name in PROFILES if name not in ("cpu", "auto")]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub answers nobody, and nothing is in a cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def plan(**settings: Any) -> Preview:
    """A day on a card that is not here, unless told otherwise."""
    return budgetsearch.plan(**{"gpu": "a100", "hours": 24, **settings})


@pytest.mark.parametrize("model", BIG)
@pytest.mark.parametrize("gpu", CARDS)
def test_every_card_has_a_plan_for_every_shipped_model(gpu: str, model: str) -> None:
    """The run ends in time, every rung gets trials, and what fits is what the table says."""
    found = plan(gpu=gpu, model=model)
    rehearsal = found.rehearsal
    assert rehearsal.spent_seconds <= 24 * 3600
    assert rehearsal.trials[0] > 0
    assert list(rehearsal.trials) == sorted(rehearsal.trials, reverse=True)
    for row in found.fits:
        assert all(cell.fits == (cell.bytes <= found.usable_bytes) for cell in row.cells)
    usable = {c.quantization for c in found.calibrations.values() if c.status == "ok"}
    fitting = {row.quantization for row in found.fits if any(cell.fits for cell in row.cells)}
    close = {
        row.quantization for row in found.fits if row.cells[0].bytes <= DOUBT * found.usable_bytes
    }  # nothing is refused within the doubt
    assert fitting <= usable <= fitting | close
    phases = rehearsal.phases
    assert all(a.start + a.seconds == pytest.approx(b.start) for a, b in itertools.pairwise(phases))
    assert sum(found.reserve.values()) == pytest.approx(rehearsal.plan.reserve_seconds)


def test_a_24_gb_card_needs_checkpointing_for_a_7b_in_16_bits() -> None:
    """The figures that a user looks for first."""
    found = plan(gpu="rtx4090")
    cells = {(r.quantization, r.rank): r.cells for r in found.fits}
    assert cells["bf16", 8][0].fits
    assert cells["bf16", 128][0].recompute
    assert not cells["nf4", 8][0].recompute
    assert found.calibrations["nf4"].rank == 128


def test_if_everything_takes_twice_as_long_the_full_run_is_half() -> None:
    """``--slow 2``: fewer tokens, the same deadline."""
    usual, slow = plan(hours=1), plan(hours=1, slow=2)
    assert slow.rehearsal.full_tokens < 0.75 * usual.rehearsal.full_tokens
    assert slow.rehearsal.spent_seconds <= 3600
    rates = [found.rehearsal.plan.reference_rates["nf4"] for found in (usual, slow)]
    assert rates[0] == pytest.approx(2 * rates[1])


def test_the_plan_is_the_runs_own() -> None:
    """Settings count as they do in a run."""
    found = plan(hours=6, eta=3, max_trials=7, batch_size=8, first_rung=0.25, space="lora", seed=3)
    rules = found.rehearsal.plan
    assert (rules.eta, rules.batch_size, rules.seed, rules.max_trials) == (3, 8, 3, 7)
    assert rules.ladder[0] == pytest.approx(0.25 * rules.ladder[-1])
    assert found.rehearsal.trials[0] <= 7


def test_a_tiny_model_is_no_thousand_times_faster() -> None:
    """Each pass costs its layers something, however little there is to compute; long passes hide it. On two
    cores SmolLM2-135M reaches 165 tokens/s with 64 tokens at once, and 270 with many."""
    small = shape_of(known_models()["HuggingFaceTB/SmolLM2-135M"])

    def rate(tokens: float) -> float:
        way = TrainedWith("fp32", 8, 1, recompute=False)
        found = guess_calibration(
            small, PROFILES["cpu"], way, cores=2, tokens_per_row=tokens, adapter_bytes=1.0, slow=1.0
        )
        return found.tokens_per_second

    assert rate(64) == pytest.approx(165, rel=0.15)
    assert rate(1e6) == pytest.approx(270, rel=0.15)


def test_too_few_hours_are_refused_with_the_minimum() -> None:
    """As the run would, but before it has cost anything."""
    with pytest.raises(BudgetError, match="--hours"):
        plan(hours=0.02)


def test_few_hours_are_no_search_and_many_do_not_help() -> None:
    """The plan says from when on configurations are compared, and from when on nothing is gained."""
    few, more = plan(hours=0.1, slow=2), plan(hours=24)
    assert few.rehearsal.trials[0] == 1
    assert 0.1 < few.search_hours < 1
    assert plan(hours=few.search_hours, slow=2).rehearsal.trials[0] > 1
    assert more.enough_hours is not None
    ample = plan(hours=1.1 * more.enough_hours).rehearsal
    assert ample.trials[0] == 200
    rate = max(ample.plan.reference_rates.values())
    assert ample.plan.full_seconds * rate == pytest.approx(ample.plan.max_tokens, rel=0.01)
    screen = Console(file=io.StringIO(), width=200)
    for found in (few, more):
        screen.print(show(found))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert f"One configuration, no comparison (from {few.search_hours:.2g} hours on it is a search)" in text
    assert f"More than {more.enough_hours:.2g} hours will hardly help with these 15011 rows." in text


@pytest.mark.parametrize(
    "settings",
    [
        {"data": "missing.jsonl"},
        {"valid": "missing.jsonl"},
        {"data": "hub:a"},
        {"data": "empty.jsonl"},
        {"data": "broken.parquet"},
        {"data": "reasoning-gym:family_relationships?size=abc"},
        {"data": "x" * 5000 + ".jsonl"},
        {"targets": ","},
        {"targets": "no_such_layer"},
        {"storage": "foo://bar"},
    ],
    ids=lambda settings: str(settings)[:40],
)
def test_what_a_run_would_refuse_is_refused(settings: dict[str, str]) -> None:
    """Nothing is made up for data that are not there."""
    Path("empty.jsonl").touch()
    Path("broken.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UsageError):
        plan(**settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": [2, 4]},
        {"hidden_size": "big"},
        {"hidden_size": -64},
        {"num_hidden_layers": 2.5},
    ],
    ids=str,
)
def test_an_odd_shape_is_refused_and_not_guessed(changes: dict[str, Any], tmp_path: Path) -> None:
    """Whatever stands in a config.json."""
    config = {**known_models()["mistralai/Mistral-7B-v0.1"], **changes}
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--probe"):
        plan(model="odd")


def test_a_card_that_stands_in_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cap, and that the speed is another card's."""
    nvml = FakeNvml(card("NVIDIA H100 80GB HBM3", 79.6))
    monkeypatch.setattr("budgetsearch.machine.detect.Driver", lambda: nvml)
    found = plan(gpu="a100")
    assert "speed is not an a100's" in found.note
    assert found.usable_bytes == PROFILES["a100"].usable_bytes


def test_an_unknown_card_is_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its speed is a guess that says so, and not that of this machine's processor."""
    nvml = FakeNvml(card("NVIDIA RTX A6000", 47.5))
    monkeypatch.setattr("budgetsearch.machine.detect.Driver", lambda: nvml)
    found = plan(gpu="auto", hours=24)
    assert found.calibrations["bf16"].tokens_per_second > 200
    assert any("--probe" in guess.source for guess in found.guesses)


def test_a_search_that_ends_early_says_when(tmp_path: Path) -> None:
    """The answers take what they take, not all that is left."""
    found = plan(max_trials=1)
    assert found.rehearsal.phases[-1].seconds < 1800
    assert found.rehearsal.spent_seconds < 20 * 3600


def test_what_does_not_fit_at_all_says_what_to_do() -> None:
    """A 14B in 16 bits on a T4."""
    space = Path("bf16.yaml")
    space.write_text(
        "dimensions:\n  quantization: {kind: constant, value: bf16}\n"
        "  rank: {kind: choice, values: [8, 16]}\n"
        "  learning_rate: {kind: float, low: 1e-5, high: 1e-3, log: true}\n"
    )
    with pytest.raises(DeviceError, match=r"does not fit into 14\.50 GiB .*a --space with nf4"):
        plan(gpu="t4", model="Qwen/Qwen-14B", space=str(space))


def test_an_unknown_model_says_where_it_was_looked_for() -> None:
    """Offline, and not in a cache."""
    with pytest.raises(ModelError, match=r"some/model: its config.json is neither here nor to be had"):
        plan(model="some/model")


def test_a_folder_needs_only_its_config(tiny_model: Path, tmp_path: Path) -> None:
    """No weights are looked at."""
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    config, source = find_config(str(folder), None, tmp_path)
    assert config["hidden_size"] == 64
    assert source.endswith("config.json")
    assert plan(model=str(folder), hours=1).weights < 10**6


def test_a_gguf_file_tells_its_shape(tmp_path: Path) -> None:
    """From its header, as llama.cpp writes it."""
    from gguf import GGUFWriter

    path = tmp_path / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(128)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_token_list([b"a", b"b", b"c"])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    shape = shape_of(find_config(str(path), None, tmp_path)[0])
    assert (shape.hidden, shape.layers, shape.wide, shape.kv_heads, shape.vocab) == (64, 3, 128, 4, 3)
    path.write_bytes(b"GGUF but torn")
    with pytest.raises(ModelError, match="header cannot be read"):
        find_config(str(path), None, tmp_path)


def test_data_are_counted_by_their_size(tmp_path: Path) -> None:
    """Rows of a JSONL exactly enough; max_rows counts."""
    path = write_rows(tmp_path / "rows.jsonl", 500)
    assert guess_data(str(path), None).rows == pytest.approx(500, rel=0.02)
    assert guess_data(str(path), 100).rows == 100
    assert guess_data("reasoning-gym:leg_counting?size=77", None).rows == 77
    assert "guess" in guess_data("hub:a/b/c.jsonl", None).source


POLITE = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant that was "
    "made by somebody to be polite to all people<|im_end|>\n' }}{%- endif %}{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{% generation %}"
    "{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}{%- else %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
)
"""Writes a system text of its own, as those of SmolLM2 and Qwen2.5 do."""
SHORT = [{"question": f"What is {n} and 40?", "answer": f"{n + 40}"} for n in range(10, 40)]


def test_a_row_is_as_long_as_the_model_will_see_it(tmp_path: Path, tiny_model: Path) -> None:
    """Whatever the file looks like: what a row says and what the template adds, of short rows the most."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(POLITE, encoding="utf-8")
    lines = [f"{row['question']};{row['answer']}" for row in SHORT]
    (tmp_path / "rows.csv").write_text("\n".join(["question;answer", *lines]), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(SHORT, indent=8), encoding="utf-8")
    names = [{"instruction": row["question"], "input": "", "output": row["answer"]} for row in SHORT]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, names)), encoding="utf-8")
    found = [
        plan(gpu="cpu", model=str(model), space="lora_small", hours=1, data=str(file)).tokens_per_row
        for file in sorted(tmp_path.glob("rows.*"))
    ]
    assert found == [pytest.approx(found[0])] * 3
    by_eye = (
        16 + 4 + 10 + 10
    )  # the system text, its turn, the heads and ends of an exchange, what the row says
    assert found[0] == pytest.approx(by_eye, rel=0.2)
    longer = guess_data(str(tmp_path / "rows.csv"), None, Reading(frame_of(model), system="Be brief. " * 8))
    assert 15 < longer.tokens_per_row - found[0] < 30


@pytest.mark.parametrize(
    "template", ["{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3, "{{ 'x' * 9999999999 }}"]
)
def test_a_template_that_hangs_or_eats_memory_holds_no_plan_up(tmp_path: Path, template: str) -> None:
    """The usual stands in its place."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    began = time.monotonic()
    assert Frame() == frame_of(tmp_path)
    assert time.monotonic() - began < WAIT_SECONDS + 5


def test_parquet_and_json_are_counted_too(tmp_path: Path) -> None:
    """Without reading them in full, or by their braces."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"question": ["what" * 10] * 50, "answer": ["that"] * 50})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps([{"question": "what", "answer": "that"}] * 30))
    assert guess_data(str(tmp_path / "rows.parquet"), None).rows == 50
    assert guess_data(str(tmp_path / "rows.json"), None).rows == 30


@pytest.mark.parametrize("slow", [0.0, -1.0, 1000.0])
def test_slow_has_bounds(slow: float) -> None:
    """Nothing divides by zero."""
    with pytest.raises(UsageError, match="--slow"):
        plan(slow=slow)


def test_the_command_takes_the_options_of_run() -> None:
    """All of them, beside its own; and prints JSON that holds what the tables show."""
    runner = CliRunner()
    helped = runner.invoke(app, ["plan", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--slow", "--probe", "--json", "--max-gang", "--keep-checkpoints", "--hours"):
        assert option in helped
    printed = runner.invoke(app, ["plan", "--gpu", "a100", "--hours", "24", "--json"])
    assert printed.exit_code == 0
    found = json.loads(printed.output)
    assert found["rehearsal"]["trials"][0] > 0
    assert found["guesses"]


def test_the_tables_say_what_matters() -> None:
    """What fits, the ladder, the phases, the reserve, the assumptions with their sources."""
    printed = CliRunner().invoke(app, ["plan", "--gpu", "rtx4090", "--hours", "8", "--slow", "2"]).output
    for text in (
        "not in this machine", "If everything takes 2 times as long", "The ladder", "trials expected",
        "What fits", "(c)", "How it would train", "The reserve", "What this rests on", "torchtune",
        "deadline",
    ):  # fmt: skip
        assert text in printed, text


def test_wrong_input_is_one_line_and_exit_code_2() -> None:
    """Like every command."""
    found = CliRunner().invoke(app, ["plan", "--gpu", "a1000"])
    assert found.exit_code == 2
    assert "did you mean 'a100'" in found.output


def test_nothing_heavy_is_imported() -> None:
    """The answer comes before torch would have been loaded."""
    code = (
        "import sys, budgetsearch; budgetsearch.plan(gpu='a100', hours=24);"
        "print([m for m in ('torch', 'transformers', 'optuna', 'scipy', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_times_are_readable() -> None:
    """Seconds, minutes, hours."""
    assert [clock(s) for s in (7, 90, 3599.6, 86_400)] == ["7 s", "1 min 30 s", "1 h 00 min", "24 h 00 min"]


@pytest.mark.slow
def test_a_probe_measures_instead_of_guessing(
    tiny_model: Path, rows_file: Path, session_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The real worker trains real steps; afterwards nothing is left but the cache."""
    caplog.set_level("INFO", logger="budgetsearch")
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(session_cache))
    monkeypatch.setattr("budgetsearch.tools.plan.probe.PROBE_SECONDS", 12.0)
    found = plan(gpu="cpu", model=str(tiny_model), data=str(rows_file), hours=0.2, max_length=128, probe=True)
    assert found.measured
    assert [c.status for c in found.calibrations.values()] == ["ok", "ok"]
    assert all(c.probes and c.peak_bytes for c in found.calibrations.values())
    assert "measuring nf4" in caplog.text
    assert found.rows == 80
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_probe_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker is killed, and the plan says that it took too long."""
    from budgetsearch.core.records import Calibration
    from budgetsearch.core.reports import JobEnded
    from budgetsearch.tools.plan import probe as probing
    from tests.support.simulation import request

    class Stuck:
        slots, killed = 1, False

        def submit(self, job: Any) -> None:
            self.job = job

        def poll(self, timeout: float) -> list[Any]:
            result = Calibration(self.job.quantization, "crashed", detail="killed")
            return [JobEnded(self.job.job_id, (result,))] if self.killed else []

        def kill(self, job_id: int) -> None:
            self.killed = True

    times = iter(range(0, 10**6, 30))
    monkeypatch.setattr(probing.time, "monotonic", lambda: float(next(times)))
    asked: PlanRequest = request()
    found = probing.measure(Stuck(), asked, ["fp32"], 6.0, lambda line: None)  # type: ignore[arg-type]
    assert found["fp32"].status == "timeout"
    assert "took more than 60 s" in found["fp32"].detail


def test_several_gpus_buy_more_trials_and_no_faster_one() -> None:
    """``--gpus 4``: the real policy with four workers, in the same hours, and what that rests on is said."""
    one, four = plan(hours=2), plan(hours=2, gpus=4, engine="ray")
    assert (1, 4) == (one.rehearsal.plan.workers, four.rehearsal.plan.workers)
    assert four.rehearsal.trials[0] > 3 * one.rehearsal.trials[0]
    assert four.rehearsal.trials[-1] > one.rehearsal.trials[-1]
    assert four.rehearsal.spent_seconds <= 2 * 3600
    phases = four.rehearsal.phases
    assert all(a.start + a.seconds == pytest.approx(b.start) for a, b in itertools.pairwise(phases))
    assert "4" == next(g.value for g in four.guesses if g.what == "workers")
    assert not [g for g in one.guesses if g.what == "workers"]


def test_the_plan_for_several_gpus_is_told() -> None:
    """In the first lines; without ``--engine ray`` it says that a run takes it, and without a number
    that it takes what Ray sees."""
    result = CliRunner().invoke(app, ["plan", "--gpu", "a100", "--hours", "2", "--gpus", "2"])
    text = " ".join(result.output.split())
    assert "on each of 2 workers, 2 h 00 min (4 h 00 min of all workers together)" in text
    assert "a run takes --engine ray for it" in text
    open_ended = plan(hours=2, engine="ray")
    assert "every GPU that Ray sees" in next(g.source for g in open_ended.guesses if g.what == "workers")


def test_a_plan_says_what_no_quantization_shrinks(tmp_path: Path) -> None:
    """A line says how wide routed experts lie, which wear adapters or take 4 bits; a dense model has none."""
    from tests.support.families import build

    experts, dense = (plan(model=str(build(name, tmp_path / name))) for name in ("qwen3_moe", "qwen3"))
    (line,) = [guess for guess in experts.guesses if guess.what == "routed experts"]
    assert line.value.startswith("4") and "of the weights, in 4 bits under nf4, else in 16" in line.value
    worn = plan(model=str(tmp_path / "qwen3_moe"), targets="experts")
    (line,) = [guess for guess in worn.guesses if guess.what == "routed experts"]
    assert "of the weights, in 16 or 32 bits" in line.value
    assert [] == [guess for guess in dense.guesses if guess.what == "routed experts"]
