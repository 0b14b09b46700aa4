"""The exporter: a whole adapter folder at every moment, and no checkpoint that nobody needs."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import CheckpointError, DiskError
from budgetsearch.core.events import CheckpointLost, Exported
from budgetsearch.core.history.retention import needed_checkpoints
from budgetsearch.run import export as exporter_module
from budgetsearch.run.export import AdapterExporter
from budgetsearch.training.sums import META_FILE, STATE_FILE, describe
from budgetsearch.views.card import adapter_card
from budgetsearch.views.loading import vllm_command
from tests.support.exporting import House, best
from tests.support.factories import FACTS, MODEL, Story, params

TORN = ".trial0001-rung0-tokens1000-attempt0.budgetsearch-0a1b2c3d"
"""What a process leaves that is killed while it writes a checkpoint."""


def test_the_export_is_an_adapter_with_tokenizer_manifest_and_card(house: House, story: Story) -> None:
    """The folder has what PEFT and the tokenizer read, and nothing of the trainer's or the base's."""
    path = Path(house.exporter().export(story.history, best(story), final=True))
    assert path == house.root / "run" / "adapter"
    assert {p.name for p in path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "vocab.json",
        "budgetsearch.json",
        "README.md",
        "SHA256SUMS",
    }
    expected = f"{best(story).best_checkpoint}/adapter_model.safetensors"
    assert expected == (path / "adapter_model.safetensors").read_text(encoding="utf-8")


def test_the_manifest_says_where_the_adapter_comes_from(house: House, story: Story) -> None:
    """Base, quantization, template, configuration, loss and versions stand in budgetsearch.json."""
    path = Path(house.exporter().export(story.history, best(story), final=True))
    manifest = json.loads((path / "budgetsearch.json").read_text(encoding="utf-8"))
    assert manifest["format"] == 1
    assert manifest["base"] == MODEL
    assert (manifest["quantization"], manifest["load"]) == ("fp32", {"dtype": "float32"})
    assert manifest["template"] == "plain"
    assert manifest["params"] == dict(best(story).trial.params)
    assert (manifest["tokens"], manifest["seed"], manifest["validation_loss"]) == (9000, 3, 0.9)
    assert manifest["score"]["adapter_loss"] == 0.9
    assert manifest["versions"]["torch"] == "2.9.0"


def test_the_card_shows_losses_accuracy_licence_and_limits(house: House, story: Story) -> None:
    """A reader learns what it is, how good it is, how to load it and where it ends."""
    path = Path(house.exporter().export(story.history, best(story), final=True))
    card = (path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: peft\n")
    for part in (
        "base_model: org/tiny",
        "license: mit",
        "| 2.0000 | 0.9000 |",
        "(n = 4, exact match of the text) | 25.0%",
    ):
        assert part in card
    for part in ("PeftModel.from_pretrained(base, '.')", "- rank: 32", "## Limits", "- sha256: ab"):
        assert part in card


def test_the_folder_is_complete_for_whoever_serves_it(house: House, story: Story) -> None:
    """The end of turn that training taught, the terms of the base, and a line for each way to use it."""
    model = house.root / "model"
    (model / "generation_config.json").write_text('{"eos_token_id": 5, "temperature": 0.6}')
    (model / "LICENSE.txt").write_text("terms", encoding="utf-8")
    data = {**FACTS["data"], "stops": [7, 5], "licences": {"rows.jsonl": None, "hub:a/b": "cc0-1.0"}}
    exporter = dataclasses.replace(house.exporter(), data_facts=data)
    path = Path(exporter.export(story.history, best(story), final=True))
    generation = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    assert {"eos_token_id": [7, 5], "temperature": 0.6} == generation
    assert "terms" == (path / "LICENSE.txt").read_text(encoding="utf-8")
    card = (path / "README.md").read_text(encoding="utf-8")
    for part in (
        "AutoModelForCausalLM.from_pretrained('.', dtype='float32')",
        "vllm serve org/tiny --tokenizer . --enable-lora --max-lora-rank 32 --lora-modules adapter=.",
        "budgetsearch export RUN --ollama",
        "- base model: MIT",
        "- data rows.jsonl: not stated with the files",
        "- data hub:a/b: cc0-1.0",
    ):
        assert part in card


@pytest.mark.parametrize(("rank", "room"), [(4, 8), (24, 32), (128, 128), (500, 512), (600, None)])
def test_vllm_is_told_a_rank_that_it_takes_and_that_holds_the_adapters(rank: int, room: int | None) -> None:
    """Above 16 it refuses without; it knows a few sizes, and none above 512."""
    command = vllm_command(MODEL, "nf4", "a", rank)
    assert (f"--max-lora-rank {room} " in command and "bitsandbytes" in command) == (room is not None)


@pytest.mark.parametrize(("quantization", "said"), [("int8", True), ("fp32", False)])
def test_the_card_of_an_int8_base_says_what_a_batch_does(story: Story, quantization: str, said: bool) -> None:
    """Losses are those of batches there, and a row alone differs."""
    card = adapter_card(story.history, best(story), MODEL, {}, quantization)
    assert said == ("LLM.int8() looks at all rows of a batch" in card)


def test_an_early_export_has_no_score_yet(house: House) -> None:
    """From the first finished segment on there is an adapter, with the loss that is known; what it lacks is
    said first."""
    story = Story.planned()
    story.train(story.trial(), 1.5)
    house.checkpoint(best(story).best_checkpoint)
    path = Path(house.exporter().export(story.history, best(story), final=False))
    card = (path / "README.md").read_text(encoding="utf-8")
    never = "losses of base and adapter were never compared: the run had not come to it."
    assert card.index("No trial ran in full") < card.index(never) < card.index("completion token): 1.5000.")
    assert json.loads((path / "budgetsearch.json").read_text(encoding="utf-8"))["score"] is None


def test_a_new_export_replaces_the_old_one_whole(house: House, story: Story) -> None:
    """Nothing of the old adapter remains, and nothing temporary beside the new one."""
    exporter = house.exporter()
    path = Path(exporter.export(story.history, story.history.trials[2], final=False))
    (path / "stale").write_text("old", encoding="utf-8")
    exporter.export(story.history, best(story), final=True)
    assert not (path / "stale").exists()
    assert {p.name for p in (house.root / "run").iterdir()} == {"adapter", "checkpoints"}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_crash_while_swapping_leaves_an_adapter(
    house: House, story: Story, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rename the process dies at, the next exporter finds a whole adapter."""
    exporter = house.exporter()
    exporter.export(story.history, story.history.trials[2], final=False)
    calls = []
    rename = os.replace

    def die(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(exporter_module, "exchange", lambda one, other: False)
        with pytest.raises(KeyboardInterrupt):
            exporter.export(story.history, best(story), final=True)
    house.exporter()
    run = house.root / "run"
    kept = (run / "adapter" / "adapter_model.safetensors").read_text(encoding="utf-8")
    assert kept.startswith("trial0002")
    assert {p.name for p in run.iterdir()} == {"adapter", "checkpoints"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="one step needs Linux")
def test_old_and_new_change_places_in_one_step(
    house: House, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a second export replaces the first one, an adapter stands at its place at every moment."""
    exporter = house.exporter()
    path = Path(exporter.export(story.history, story.history.trials[2], final=False))
    rename, stood = os.replace, []

    def watched(source: Any, target: Any) -> None:
        rename(source, target)
        stood.append(path.is_dir())

    monkeypatch.setattr(os, "replace", watched)
    exporter.export(story.history, best(story), final=True)
    assert all(stood)
    assert (path / "adapter_model.safetensors").read_text(encoding="utf-8").startswith("trial0003")


def test_a_missing_checkpoint_is_one_clear_error(house: House, story: Story) -> None:
    """The old adapter stays, and the message names the checkpoint."""
    exporter = house.exporter()
    path = Path(exporter.export(story.history, story.history.trials[2], final=False))
    (house.checkpoints / best(story).best_checkpoint / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="trial0003-rung2"):
        exporter.export(story.history, best(story), final=True)
    assert (path / "adapter_model.safetensors").is_file()


def test_sweeping_keeps_what_the_run_may_want(house: House, story: Story) -> None:
    """Each living trial keeps its last checkpoint; older ones and crashed writers' folders go."""
    (house.checkpoints / TORN).mkdir()
    (house.checkpoints / "notes").mkdir()
    house.exporter().sweep(story.history)
    assert house.listing() == {*needed_checkpoints(story.history), "notes"}
    assert "trial0003-rung0-tokens1000-attempt0" not in house.listing()


def test_keeping_checkpoints_keeps_them(house: House, story: Story) -> None:
    """Only crashed writers' folders go."""
    (house.checkpoints / TORN).mkdir()
    before = house.listing() - {TORN}
    house.exporter(keep=True).sweep(story.history)
    assert house.listing() == before


def test_sweeping_leaves_running_trials_alone(house: House) -> None:
    """What a job under way has written is not in the ledger yet, and still stays."""
    story = Story.planned()
    story.train(story.trial(), 1.5)
    story.trial(params(4))
    story.start(1)
    names = {
        best(story).best_checkpoint,
        "trial0001-rung0-tokens1000-attempt0",
        TORN,
    }
    for name in names:
        house.checkpoint(name)
    house.exporter().sweep(story.history)
    assert house.listing() == names


def test_the_adapter_says_where_answers_end_and_how_to_ask(house: House, story: Story) -> None:
    """Beside what the base says of generation: the trained ends first, and the template that rows were
    rendered with."""
    model = house.root / "model"
    base = '{"_from_model_config": true, "eos_token_id": 1, "temperature": 0.6}'
    (model / "generation_config.json").write_text(base, encoding="utf-8")
    facts = {**FACTS["data"], "stops": [7, 1], "chat_template": "{{ messages }}"}
    exporter = dataclasses.replace(house.exporter(), data_facts=facts)
    path = Path(exporter.export(story.history, best(story), final=True))
    config = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    assert {"eos_token_id": [7, 1], "temperature": 0.6} == config
    assert "{{ messages }}" == (path / "chat_template.jinja").read_text(encoding="utf-8")


def test_the_snippet_loads_what_was_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of the manifest's card run as they stand, against a real base, adapter and tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from budgetsearch.views.loading import load_snippet
    from tests.support.tiny import make_tiny_model

    base_path = make_tiny_model(tmp_path / "model")
    story = Story.planned()
    story.train(story.trial(), 1.5)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(base_path), config)
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoint = checkpoints / best(story).best_checkpoint
    trained.save_pretrained(checkpoint)
    (checkpoint / STATE_FILE).write_bytes(b"not read here")
    (checkpoint / META_FILE).write_text(json.dumps(describe(checkpoint)), encoding="utf-8")
    facts = {**MODEL, "loadable": str(base_path)}

    data = {**FACTS["data"], "stops": [257]}
    assert story.history.opened is not None
    opened = dataclasses.replace(story.history.opened, facts={**FACTS, "data": data})
    monkeypatch.setattr(story.history, "opened", opened)
    exporter = AdapterExporter(tmp_path / "run", checkpoints, facts, data, base_path)
    path = exporter.export(story.history, best(story), final=True)
    loaded: dict[str, Any] = {}
    exec("\n".join(load_snippet(facts, "fp32", path, "cpu", stops=True)), loaded)

    ids = loaded["tokenizer"]("abc", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, actual = trained.eval()(ids).logits, loaded["model"](ids).logits
    torch.testing.assert_close(actual, expected)
    assert [257] == loaded["model"].generation_config.eos_token_id[:1]


# ------------------------------------------------------------------------ damage


def spoil(file: Path) -> None:
    """Another byte, the same length."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("failing", range(6))
def test_while_a_new_adapter_is_built_the_old_one_stays_whole(
    house: House, story: Story, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever copy fails for want of room: until the last moment nothing of the old folder is touched, and
    what was built beside it is gone again."""
    exporter = house.exporter()
    path = Path(exporter.export(story.history, story.history.trials[2], final=False))
    old = {file.name: (file.read_bytes(), file.stat().st_ino) for file in path.iterdir()}
    copied: list[str] = []
    copy = shutil.copyfile

    def copyfile(source: Path, target: Path) -> None:
        assert path not in Path(target).parents, "copied in place"
        if len(copied) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        copied.append(copy(source, target))
        assert old == {file.name: (file.read_bytes(), file.stat().st_ino) for file in path.iterdir()}

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(DiskError, match="make room, then resume"):
        exporter.export(story.history, best(story), final=True)
    assert len(copied) == failing
    assert old == {file.name: (file.read_bytes(), file.stat().st_ino) for file in path.iterdir()}
    assert exporter.stands(str(story.history.trials[2].best_checkpoint))
    assert {p.name for p in (house.root / "run").iterdir()} == {"adapter", "checkpoints"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_checkpoint_never_takes_the_adapters_place(house: House, story: Story, name: str) -> None:
    """Its sums are compared with what was copied, before the two change places."""
    exporter = house.exporter()
    path = Path(exporter.export(story.history, story.history.trials[2], final=False))
    spoil(house.checkpoints / best(story).best_checkpoint / name)
    assert "has changed" in exporter.damage(best(story))
    with pytest.raises(CheckpointError, match=f"{name} has changed"):
        exporter.export(story.history, best(story), final=True)
    assert (path / "adapter_model.safetensors").read_text(encoding="utf-8").startswith("trial0002")
    assert exporter.stands(str(story.history.trials[2].best_checkpoint))
    assert {p.name for p in (house.root / "run").iterdir()} == {"adapter", "checkpoints"}


def test_the_adapter_carries_sums_that_others_can_check(house: House, story: Story) -> None:
    """``sha256sum --check`` reads them; whatever changes is noticed, a foreign name is refused."""
    exporter = house.exporter()
    path = Path(exporter.export(story.history, best(story), final=True))
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path, check=False)
    assert done.returncode == 0
    name = str(best(story).best_checkpoint)
    assert exporter.stands(name)
    assert not exporter.stands("another")
    for file in sorted(path.iterdir()):
        kept = file.read_bytes()
        spoil(file)
        assert not exporter.stands(name), file.name
        file.write_bytes(kept)
    sums = path / "SHA256SUMS"
    sums.write_text(sums.read_text(encoding="utf-8") + f"{'0' * 64}  ../secret\n", encoding="utf-8")
    assert not exporter.stands(name)


def test_of_a_lost_checkpoint_the_exported_adapter_is_kept_and_signed(house: House, story: Story) -> None:
    """The final export is made from the adapter that stands, with the same weights and the last scores."""
    exporter = house.exporter()
    name = str(best(story).best_checkpoint)
    path = Path(exporter.export(story.history, best(story), final=False))
    weights = (path / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(house.checkpoints / name)
    assert {name} == set(exporter.missing([name, str(story.history.trials[2].checkpoint)]))
    story.add(Exported(3, name, str(path), False), CheckpointLost(name, "it is gone"))
    assert name == best(story).best_checkpoint
    exporter.export(story.history, best(story), final=True)
    assert weights == (path / "adapter_model.safetensors").read_bytes()
    assert exporter.stands(name)
    spoil(path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError):
        exporter.export(story.history, best(story), final=True)


def test_a_finished_runs_adapter_is_mended_from_its_checkpoint(house: House, story: Story) -> None:
    """Only if it is damaged; if that cannot be done either, it is said."""
    exporter, said = house.exporter(), list[str]()
    path = Path(exporter.export(story.history, best(story), final=True))

    def mended() -> bool:
        said.clear()
        exporter_module.mend(exporter, story.history, said.append, lambda: house.root / "model")
        return bool(said)

    assert not mended()
    spoil(path / "adapter_config.json")
    assert mended()
    assert exporter.stands(str(best(story).best_checkpoint))
    spoil(path / "adapter_config.json")
    spoil(house.checkpoints / str(best(story).best_checkpoint) / "adapter_config.json")
    assert mended()
    assert "cannot be written again" in said[-1]


def test_a_removed_run_folder_is_not_made_again(house: House, story: Story) -> None:
    """Whoever removed it does not want another one there."""
    exporter = house.exporter()
    elsewhere = house.root / "elsewhere"
    (house.root / "run").rename(elsewhere)
    exporter.checkpoint_path = elsewhere / "checkpoints"
    with pytest.raises(DiskError, match="bring the folder back"):
        exporter.export(story.history, best(story), final=True)
    assert not (house.root / "run").exists()
