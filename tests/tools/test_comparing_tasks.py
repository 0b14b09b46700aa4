"""Tasks: real bases and adapters answer, once; what was answered is kept and paired."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from budgetsearch import api
from budgetsearch.core.errors import BudgetsearchError, ModelError, UsageError
from budgetsearch.run.configuration import load_settings
from budgetsearch.storage.ledger import read_history
from budgetsearch.storage.runfolder import MANIFEST_FILE
from budgetsearch.tools.compare import ask, kept
from budgetsearch.tools.compare.comparison import Comparison
from budgetsearch.tools.compare.harness import read_samples
from budgetsearch.tools.compare.tasks import SCENARIOS, Task, Tasks, parse_tasks
from budgetsearch.training.bases import load_base
from budgetsearch.training.data.models import resolve_model
from budgetsearch.training.data.tokenizer import load_tokenizer
from tests.support.command_line import invoke
from tests.support.comparable import score, write_run
from tests.support.local_tasks import write_choice_task

GYM = "reasoning-gym:chain_sum?size=4&seed=7"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Two runs of the tiny model with adapters of random weights, and a cache."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("asked")
    sha256 = resolve_model(str(tiny_model), folder / "cache").sha256
    config = {"model": str(tiny_model), "data": GYM, "gpu": "cpu", "space": "lora_small", "hours": 0.2}
    values = load_settings(config, None, cwd=folder).model_dump(mode="json")
    facts = {"model": {"source": str(tiny_model), "loadable": str(tiny_model), "sha256": sha256}}
    for number, name in enumerate(("one", "two")):
        run = write_run(folder / name, score(), settings=values, facts=facts)
        torch.manual_seed(number)
        # B of random weights too: a fresh adapter would answer as its base does.
        lora = LoraConfig(
            r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        get_peft_model(load_base(str(tiny_model), "fp32", "cpu"), lora).save_pretrained(run / "adapter")
        best = read_history(run / "ledger.sqlite").incumbent
        assert best is not None
        (run / "adapter" / MANIFEST_FILE).write_text(json.dumps({"checkpoint": best.best_checkpoint}))
    return folder


@pytest.fixture
def compare(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Comparison]:
    """``api.compare`` on both runs; what was kept before is gone."""
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(place / "cache"))
    for path in place.glob(f"*/{kept.FOLDER}/*"):
        path.unlink()
    runs = [place / "one", place / "two"]
    return lambda names, limit=None, **more: api.compare(runs, tasks=Tasks(names, limit), **more)


def greedy(place: Path, tiny_model: Path, run: str | None, prompts: list[str], tokens: int) -> list[str]:
    """What a base, or an adapter on it, answers, by the libraries alone."""
    from peft import PeftModel

    model = load_base(str(tiny_model), "fp32", "cpu")
    if run:
        model = PeftModel.from_pretrained(model, place / run / "adapter")
    tokenizer = load_tokenizer(tiny_model)
    found = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        found.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


def other_version(package: str) -> Callable[[str], str]:
    """``importlib.metadata.version`` after an upgrade of this package."""
    return lambda name: "999" if name == package else version(name)


def write_task(path: Path, prompts: list[str], answers: list[str]) -> Path:
    """Rows of a file of our own."""
    lines = [json.dumps({"prompt": p, "completion": a}) for p, a in zip(prompts, answers, strict=True)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_each_answers_with_its_own_weights(
    compare: Callable[..., Comparison], place: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Of a task made of what adapter two answers, two has all right, one and the base none; the base stays
    bare between them, and both adapters are put on one resident base."""
    prompts = [f"Say {word}" for word in ("red", "green", "blue")]
    texts = greedy(place, tiny_model, "two", prompts, 12)
    others = greedy(place, tiny_model, "one", prompts, 12) + greedy(place, tiny_model, None, prompts, 12)
    assert not set(texts) & set(others)
    # Graded as a number after ####, a row would need that; equal text is what counts here.
    task = write_task(tmp_path / "task.jsonl", prompts, texts)
    found = compare(f"{task}")
    (measured,) = found.tasks
    assert measured.measure.examples == 3
    if all(texts):
        rates = {name: mean.value for name, mean in measured.means.items()}
        assert {"two", "one", "base fp32"} == set(rates)
        assert rates["one"] == rates["base fp32"] == 0.0


def test_a_strangers_code_is_allowed_by_name(
    place: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked before: exit code 2, and run, model and flag are named; with the flag a base whose
    code has changed since is not loaded."""
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(place / "cache"))
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "theirs.TheirModel"}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (base / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n", encoding="utf-8")
    given = {"model": str(base), "data": GYM, "gpu": "cpu", "space": "lora_small", "hours": 0.2}
    values = load_settings({**given, "trust_remote_code": True}, None, cwd=tmp_path).model_dump(mode="json")
    known = resolve_model(str(base), tmp_path / "cache", trust_remote_code=True)
    facts = {"model": {"source": str(base), "loadable": str(base), "sha256": known.sha256}}
    run = write_run(tmp_path / "theirs", score(), settings=values, facts=facts)
    shutil.copytree(place / "one" / "adapter", run / "adapter")
    ask_it = ("compare", run, "--tasks", GYM, "--limit", "1", "--out", tmp_path / "out")
    code, output = invoke(*map(str, ask_it))
    assert code == 2
    flat = "".join(output.split())
    assert {True} == {part in flat for part in (str(run), str(base), "--trust-remote-code")}
    (base / "theirs.py").write_text("print('other code')\n", encoding="utf-8")
    code, output = invoke(*map(str, ask_it), "--trust-remote-code")
    assert (2, True) == (code, "has changed since" in " ".join(output.split()))
    assert not (tmp_path / "ran").exists()


def test_a_second_comparison_asks_nothing(
    compare: Callable[..., Comparison], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same question has the same answer: no model is loaded; another limit is another question."""
    first = compare(GYM, limit=2)
    assert {"one", "two", "base fp32"} == set(first.tasks[0].means)
    assert first.tasks[0].measure.examples == 2
    assert len(list(place.glob(f"*/{kept.FOLDER}/*.json"))) == 3

    def refused(*arguments: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ask.Room, "opened", refused)
    assert first.tasks == compare(GYM, limit=2).tasks
    # Another lm-eval changes nothing of what is graded here; another transformers may.
    monkeypatch.setattr(kept.importlib.metadata, "version", other_version("lm-eval"))
    assert first.tasks == compare(GYM, limit=2).tasks
    monkeypatch.setattr(kept.importlib.metadata, "version", other_version("transformers"))
    with pytest.raises(AssertionError, match="loaded"):
        compare(GYM, limit=2)
    monkeypatch.setattr(kept.importlib.metadata, "version", version)
    with pytest.raises(AssertionError, match="loaded"):
        compare(GYM, limit=3)


def test_prompts_that_stand_in_the_data_of_a_run_are_counted(compare: Callable[..., Comparison]) -> None:
    """The generator moves its seed on row by row: the next seed has the same rows but one, a far one none."""
    found = compare(f"{GYM},reasoning-gym:chain_sum?size=4&seed=8,reasoning-gym:chain_sum?size=4&seed=8000")
    notes = [note.partition(" too ")[0] for note in found.notes if "no test" in note]
    assert [
        "4 of 4 prompts of chain_sum stand in the data of one, two",
        "3 of 4 prompts of chain_sum (2) stand in the data of one, two",
    ] == notes


def test_a_damaged_answer_is_asked_again(compare: Callable[..., Comparison], place: Path) -> None:
    """Half a file, or one of another question, counts as none."""
    first = compare(GYM, limit=1)
    for path in place.glob(f"*/{kept.FOLDER}/*.json"):
        path.write_text(path.read_text(encoding="utf-8")[:40], encoding="utf-8")
    assert first.tasks == compare(GYM, limit=1).tasks


def test_an_interruption_keeps_what_is_done(compare: Callable[..., Comparison], place: Path) -> None:
    """The first to be asked has answered, the others have not; the next comparison asks the rest."""
    asked: list[str] = []

    def tick(what: str, done: int, total: int) -> None:
        asked.append(what)
        if what.startswith("two"):
            raise KeyboardInterrupt

    found = compare(GYM, limit=1, tick=tick)
    assert found.interrupted
    assert {"base fp32", "one"} == set(found.tasks[0].means)
    asked.clear()
    found = compare(GYM, limit=1, tick=lambda what, done, total: asked.append(what))
    assert {"two: chain_sum"} == set(asked)
    assert {"base fp32", "one", "two"} == set(found.tasks[0].means)


def test_a_run_without_an_adapter_answers_nothing_and_is_named(
    compare: Callable[..., Comparison], place: Path, tmp_path: Path
) -> None:
    """The others are compared all the same."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "ledger.sqlite").write_bytes((place / "one" / "ledger.sqlite").read_bytes())
    found = api.compare([place / "one", bare], tasks=Tasks(GYM, limit=1))
    assert {"base fp32", "one"} == set(found.tasks[0].means)
    assert "bare: there is no adapter on disk, so it answered nothing" in found.notes


def test_another_trials_adapter_does_not_answer_in_the_name_of_the_best(
    compare: Callable[..., Comparison], place: Path, tmp_path: Path
) -> None:
    """After a lost end of the ledger: what the adapter itself says counts."""
    other = tmp_path / "other"
    shutil.copytree(place / "one", other)
    (other / "adapter" / MANIFEST_FILE).write_text(json.dumps({"checkpoint": "trial0007-rung0"}))
    found = api.compare([place / "one", other], tasks=Tasks(GYM, limit=1))
    assert {"base fp32", "one"} == set(found.tasks[0].means)
    assert any("other: the adapter on disk is not that of its best trial" in note for note in found.notes)


def test_a_base_that_has_changed_is_refused(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Its answers would not be those of the run."""
    config = {"model": str(tiny_model), "gpu": "cpu"}
    values = load_settings(config, None, cwd=tmp_path).model_dump(mode="json")
    run = write_run(tmp_path / "run", score(), settings=values)
    (run / "adapter").symlink_to(place / "one" / "adapter")
    with pytest.raises(ModelError, match="has changed since"):
        api.compare([run], tasks=Tasks(GYM, limit=1))


def test_tasks_are_split_at_commas_outside_of_brackets() -> None:
    """A parameter may be a list; the same task twice is one; names are short and unique."""
    assert ["chain_sum", "chain_sum (2)"] == [
        task.name for task in parse_tasks(f"{GYM}, reasoning-gym:chain_sum?size=3&seed=1,{GYM}")
    ]
    standard = [(task.name, task.ours) for task in parse_tasks("gsm8k,arc_easy")]
    assert [("gsm8k", False), ("arc_easy", False)] == standard


def test_samples_of_a_group_stand_one_after_the_other_under_the_first_metric_and_filter() -> None:
    """lm-eval logs each example once for each filter; the first filter and the first metric count."""
    samples = {
        "a": [
            {"doc_hash": "x", "filter": "strict", "exact_match": 1.0, "other": 0.0},
            {"doc_hash": "x", "filter": "loose", "exact_match": 0.0, "other": 0.0},
        ],
        "b": [{"doc_hash": "x", "filter": "strict", "exact_match": 0, "other": 9.0}],
    }
    listed = {"metric_list": [{"metric": "exact_match", "higher_is_better": True}, {"metric": "other"}]}
    found = read_samples(Task("group", "group"), samples, {"a": listed, "b": listed})
    assert (("a x", "b x"), (1.0, 0.0)) == (found.examples, found.grades)
    assert (found.metric, found.higher_is_better) == ("exact_match, strict", True)
    logged = {"a": [{"doc_hash": "x", "bleu": ("r", "p")}]}
    with pytest.raises(BudgetsearchError, match="no number for each example"):
        read_samples(Task("t", "t"), logged, {"a": {"metric_list": [{"metric": "bleu"}]}})


# ---------------------------------------------------------------------------- lm-eval


def test_without_lm_eval_the_extra_is_named(
    compare: Callable[..., Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error, before anything is loaded."""
    from budgetsearch.training import harness

    harness.task_manager.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"pip install 'budgetsearch\[eval\]'"):
        compare("gsm8k")


def test_a_standard_task_on_local_files(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks the base and both adapters eight examples of a local task; results are paired and kept."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval)")
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(place / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "definitions"
    write_choice_task(folder, "colours_local")
    arguments = [
        *("compare", str(place / "one"), str(place / "two"), "--limit", "8"),
        *("--tasks", f"colours_local,{GYM}", "--task-data", str(folder), "--out", str(tmp_path / "out")),
    ]
    code, text = invoke(*arguments)
    assert code == 0, text
    values = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    task = next(one for one in values["measures"] if one["name"] == "colours_local")
    names = {entrant["name"] for entrant in task["entrants"]}
    assert (task["examples"], names) == (8, {"one", "two", "base fp32"})
    assert {0.0, 1.0} >= {value for entrant in task["entrants"] for value in entrant["values"]}
    assert {"colours_local", "chain_sum"} == set(values["challenge"]["entrants"][0]["rates"])
    with pytest.raises(UsageError, match="colours_local"):
        api.compare([place / "one"], tasks=Tasks("colours_locally", folder=folder))


@pytest.mark.slow
def test_the_challenges_evaluation_is_one_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five scenarios, the BIG-bench tasks as one of them, on local definitions of the same names; with the
    score, and what each run cost."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval)")
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(place / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    names = [name for source in SCENARIOS.values() for name in source.split(",")]
    for name in names:
        write_choice_task(tmp_path / "tasks", name)
    arguments = ["compare", str(place / "one"), str(place / "two"), "--tasks", "challenge", "--limit", "1"]
    arguments += ["--task-data", str(tmp_path / "tasks"), "--price", "36", "--json"]
    code, text = invoke(*arguments)
    assert code == 0, text
    values = json.loads(text[text.index("{\n") :])
    measures = {one["name"]: one["examples"] for one in values["measures"] if one["name"] in SCENARIOS}
    assert {"MMLU": 1, "TruthfulQA": 1, "BIG-bench": 9, "GSM8K": 1, "BBQ": 1} == measures
    assert set(SCENARIOS) == set(values["challenge"]["entrants"][0]["rates"])
    for run in values["runs"]:
        assert pytest.approx(run["costs"]["device_seconds"] / 100) == run["cost"]
    with pytest.raises(UsageError, match="--price must be"):
        api.compare([place / "one"], price=-1.0)
