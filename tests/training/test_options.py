"""The options that decide how rows become tokens: from settings to cache, scores and export."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from budgetsearch.core.errors import DataError, ModelError
from budgetsearch.run.preflight import anchored
from budgetsearch.run.prepare import options_of
from budgetsearch.run.settings import Settings
from budgetsearch.training.data.encoder import Encoder, check_vocabulary
from budgetsearch.training.data.templates import Options, written
from budgetsearch.training.data.tokenizer import load_tokenizer
from budgetsearch.training.data.tokens import PreparedData, Sources, prepare
from budgetsearch.training.evaluate import generate_answers
from tests.support.chat_templates import TEMPLATES
from tests.support.tiny import CHAT_TEMPLATE, make_tiny_model
from tests.support.tokenizers import bytes_tokenizer

NEEDED = {"model": "m", "data": "d", "space": "s", "max_length": 64, "batch_size": 8}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose tokens are bytes."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "chat")


def prepared(model: Path, folder: Path, options: Options) -> PreparedData:
    """Some rows with reasoning."""
    rows = [{"prompt": f"q{i}", "completion": f"<think>\nHm.\n</think>\n\na{i}"} for i in range(4)]
    source = folder / "x.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(model, Sources(str(source)), max_length=256, cache=folder / "cache", options=options)


def test_settings_decide_on_tokens_cache_and_export(tiny: Path, tmp_path: Path) -> None:
    """With other options the rows are others, in another place of the cache; the template that asks alike
    goes with the adapter."""
    plain = prepared(tiny, tmp_path, options_of(Settings.model_validate(NEEDED)))
    chosen = {"system": "Be kind.", "thinking": "off", "train_on": "last", "template": CHAT_TEMPLATE + "!"}
    other = prepared(tiny, tmp_path, options_of(Settings.model_validate({**NEEDED, **chosen})))
    tokenizer = load_tokenizer(tiny)
    assert ("", plain.folder.parent) == (plain.facts["chat_template"], other.folder.parent)
    assert plain.folder != other.folder
    assert "Hm." in tokenizer.decode(plain.train.row(0)[0])
    text = tokenizer.decode(other.train.row(0)[0])
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq")
    assert "Hm." not in text
    used = other.facts["chat_template"]
    ask = [{"role": "user", "content": "q"}]
    asked = tokenizer.apply_chat_template(ask, chat_template=used, tokenize=False, add_generation_prompt=True)
    assert text.partition("user")[0] == asked.partition("user")[0]
    assert asked.endswith("<|im_start|>assistant\n!")


def test_a_run_remembers_what_was_in_the_template_s_file(tmp_path: Path) -> None:
    """The file may change or go; what cannot be meant is refused at once."""
    file = tmp_path / "mine.jinja"
    file.write_text(CHAT_TEMPLATE, encoding="utf-8")
    settings = Settings.model_validate({**NEEDED, "template": str(file)})
    assert CHAT_TEMPLATE == anchored(settings).template
    assert ("chatml", CHAT_TEMPLATE) == (written("chatml"), written(CHAT_TEMPLATE))
    file.write_text("hello", encoding="utf-8")
    for name in (str(file), str(tmp_path / "gone.jinja"), "chatlm"):
        with pytest.raises(DataError, match="--template"):
            written(name)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    """With both numbers, also where the language model is a part of another."""
    tokenizer = bytes_tokenizer(["<|im_end|>"], None)
    for config, refused in (({"vocab_size": 257}, False), ({"text_config": {"vocab_size": 256}}, True)):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if refused:
            with pytest.raises(ModelError, match=r"257 tokens.*embeddings have 256"):
                check_vocabulary(tokenizer, tmp_path)
        else:
            check_vocabulary(tokenizer, tmp_path)


def test_generation_stops_where_training_taught_it_to() -> None:
    """At the trained end of turn, whatever the tokenizer calls its eos; prompts are padded on the left."""
    template, specials, names = TEMPLATES["chatml"]
    encoder = Encoder(bytes_tokenizer(specials, template, **names))
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    seen: dict[str, Any] = {}

    def generate(**given: Any) -> torch.Tensor:
        seen.update(given)
        said = torch.tensor([[*encoder.tokenizer("Red.")["input_ids"], end, 65, 65]] * 2)
        return torch.cat([given["input_ids"], said], dim=1)

    model = SimpleNamespace(generate=generate)
    answers = generate_answers(
        model, encoder.reader, [[1, 2, 3], [4]], device="cpu", max_new_tokens=8, max_prompt_tokens=2
    )
    assert ["Red.", "Red."] == answers
    assert end == seen["eos_token_id"][0]
    assert [[2, 3], [encoder.tokenizer.pad_token_id or 0, 4]] == seen["input_ids"].tolist()
    assert [[1, 1], [0, 1]] == seen["attention_mask"].tolist()
