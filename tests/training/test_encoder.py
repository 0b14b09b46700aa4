# ruff: noqa: E501 (tables of rows)
"""What is learned of a row, under templates with the quirks of today's models: ``[[`` and ``]]`` enclose it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from budgetsearch.core.errors import DataError
from budgetsearch.training.data import answers
from budgetsearch.training.data.conversation import Skip
from budgetsearch.training.data.encoder import Encoder
from budgetsearch.training.data.shapes import sample_of
from budgetsearch.training.data.templates import Options
from tests.support.chat_templates import TEMPLATES
from tests.support.tokenizers import bytes_tokenizer, merging_tokenizer, sentencepiece_tokenizer


def encoder(name: str, options: Options | None = None, max_length: int | None = None) -> Encoder:
    """One that has a token for each byte."""
    template, specials, names = TEMPLATES[name]
    return Encoder(bytes_tokenizer(specials, template, **names), options, max_length)


def chat(*turns: str | dict[str, Any], **beside: Any) -> dict[str, Any]:
    """A row: a user's turn and an assistant's in turn; what is no text is a message already."""
    said: list[dict[str, Any]] = []
    for turn in turns:
        role = "assistant" if said and said[-1]["role"] in ("user", "tool") else "user"
        said.append({"role": role, "content": turn} if isinstance(turn, str) else turn)
    return {"messages": said, **beside}


def shown(made: Encoder, row: dict[str, Any]) -> str:
    """The row as the model sees it, with what is learned in double brackets."""
    (found,) = made.encode(sample_of(row)[0])
    text, on = "", 0
    for token, trained in zip([*found.ids, None], [*found.trained, 0], strict=True):
        text += ("", "[[", "]]")[trained - on] + ("" if token is None else made.tokenizer.decode([token]))
        on = trained
    return text


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "b"}'}}],
}
LONG_CALL = CALL | {"tool_calls": [{"id": "call_9f8e7d6c5b4a", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": '{"c": 1}'}
ANSWER = {"role": "assistant", "content": "Two."}
SYSTEM = {"role": "system", "content": "Be kind."}
THOUGHT = {"role": "assistant", "content": "Red.", "reasoning_content": "Hm."}
INLINE = "<think>\nHm.\n</think>\n\nRed."
TOOLS = [{"name": "f", "parameters": {}}]
HEAD = "<|start_header_id|>assistant<|end_header_id|>\n\n"
DATE = "<|begin|><|start_header_id|>system<|end_header_id|>\n\nDate: 26 Jul 2024\n\n{}<|eot_id|>"
ASK3 = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
IM_USER, IM_HEAD = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"
OSS = "<|start|>system<|message|>Current date: 2024-07-26<|end|>"
FINAL = "<|start|>assistant[[<|channel|>final<|message|>"
ROWS = [
    ("chatml", chat("A?", "Red.", "B?", "Blue."),
     IM_USER.format("A?") + IM_HEAD + "[[Red.<|im_end|>]]\n" + IM_USER.format("B?") + IM_HEAD + "[[Blue.<|im_end|>]]\n"),
    ("chatml", chat("A?", "Say <|im_end|> x", "B?", "Blue."),
     IM_USER.format("A?") + IM_HEAD + "[[Say <|im_end|> x<|im_end|>]]\n" + IM_USER.format("B?") + IM_HEAD
     + "[[Blue.<|im_end|>]]\n"),
    ("chatml", chat("A?", THOUGHT), IM_USER.format("A?") + IM_HEAD + f"[[{INLINE}<|im_end|>]]\n"),
    ("chatml", chat("A?", {"role": "assistant", "content": "  Red.\n"}, "again", "assistant"),
     IM_USER.format("A?") + IM_HEAD + "[[  Red.\n<|im_end|>]]\n" + IM_USER.format("again") + IM_HEAD
     + "[[assistant<|im_end|>]]\n"),
    ("chatml", chat("A?", ANSWER | {"weight": 0}, "B?", "Blue."),
     IM_USER.format("A?") + IM_HEAD + "Two.<|im_end|>\n" + IM_USER.format("B?") + IM_HEAD + "[[Blue.<|im_end|>]]\n"),
    ("llama3", chat(SYSTEM, "A?", " Red. ", "B?", "Blue."),
     DATE.format("Be kind.") + ASK3.format("A?") + HEAD + "[[Red.<|eot_id|>]]" + ASK3.format("B?") + HEAD
     + "[[Blue.<|eot_id|>]]"),
    ("llama3", chat("A?", CALL, RESULT, ANSWER, tools=TOOLS),
     DATE.format("") + ASK3.format('{"type": "function", "function": {"name": "f", "parameters": {}}}\n\nA?') + HEAD
     + '[[<|python_tag|>{"name": "f", "parameters": {"a": "b"}}<|eom_id|>]]'
     + '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"c\\": 1}"<|eot_id|>' + HEAD + "[[Two.<|eot_id|>]]"),
    ("qwen2.5", chat("A?", CALL, RESULT, ANSWER),
     "<|im_start|>system\nYou are kind.<|im_end|>\n" + IM_USER.format("A?")
     + '<|im_start|>assistant\n[[<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call><|im_end|>]]\n'
     + IM_USER.format('<tool_response>\n{"c": 1}\n</tool_response>') + IM_HEAD + "[[Two.<|im_end|>]]\n"),
    ("qwen3", chat("A?", THOUGHT, "B?", INLINE),
     IM_USER.format("A?") + IM_HEAD + "[[Red.<|im_end|>]]\n" + IM_USER.format("B?") + IM_HEAD
     + f"[[{INLINE}<|im_end|>]]\n"),
    ("qwen3", chat("A?", CALL | {"reasoning_content": "Hm."}, RESULT, ANSWER, "B?", "Red."),
     IM_USER.format("A?") + IM_HEAD + '[[<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call><|im_end|>]]\n'
     + IM_USER.format('<tool_response>\n{"c": 1}\n</tool_response>') + IM_HEAD + "[[Two.<|im_end|>]]\n"
     + IM_USER.format("B?") + IM_HEAD + "[[<think>\n\n</think>\n\nRed.<|im_end|>]]\n"),
    ("qwen3.5", chat("A?", THOUGHT), IM_USER.format("A?") + IM_HEAD + "<think>\n[[Hm.\n</think>\n\nRed.<|im_end|>]]\n"),
    ("qwen3.5", chat("A?", "Red."), IM_USER.format("A?") + IM_HEAD + "<think>\n[[\n</think>\n\nRed.<|im_end|>]]\n"),
    ("mistral", chat(SYSTEM, "A?", "Red.", "B?", "Blue."),
     "<s>[INST] Be kind.\n\nA? [/INST][[ Red.</s>]][INST] B? [/INST][[ Blue.</s>]]"),
    ("mistral tools", chat("A?", CALL, RESULT, ANSWER, "B?", "Red."),
     '<s>[INST]A?[/INST][[[TOOL_CALLS][{"name": "f", "arguments": {"a": "b"}, "id": "call00100"}]</s>]]'
     '[TOOL_RESULTS]{"c": 1}call00100[/TOOL_RESULTS][[Two.</s>]][INST]B?[/INST][[Red.</s>]]'),
    ("mistral late", chat(SYSTEM, "A?", LONG_CALL, RESULT | {"tool_call_id": "call_9f8e7d6c5b4a"}, ANSWER),
     '<s>[INST] Be kind.\n\nA?[/INST][[[TOOL_CALLS] [{"name": "f", "id": "call00000"}]</s>]]'
     '[TOOL_RESULTS] {"c": 1} call00000[/TOOL_RESULTS][[ Two.</s>]]'),
    ("mistral strict", chat(SYSTEM, "A?", "Red."), "<s>[INST] Be kind.\n\nA? [/INST][[Red.</s>]]"),
    ("gemma", chat(SYSTEM, "A?", " Red.\n", "B?", "Blue."),
     "<bos><start_of_turn>user\nBe kind.\n\nA?<end_of_turn>\n<start_of_turn>model\n[[Red.<end_of_turn>]]\n"
     "<start_of_turn>user\nB?<end_of_turn>\n<start_of_turn>model\n[[Blue.<end_of_turn>]]\n"),
    ("phi4", chat("A?", "Red.", "B?", "Blue."),
     "<|im_start|>user<|im_sep|>A?<|im_end|><|im_start|>assistant<|im_sep|>[[Red.<|im_end|>]]"
     "<|im_start|>user<|im_sep|>B?<|im_end|><|im_start|>assistant<|im_sep|>[[Blue.<|im_end|>]]"),
    ("phi3", chat("A?", "Red.", "B?", "Blue."),
     "<|user|>\nA?<|end|>\n<|assistant|>\n[[Red.<|end|>]]\n<|user|>\nB?<|end|>\n<|assistant|>\n[[Blue.<|end|>]]\n"
     "<|endoftext|>"),
    ("deepseek", chat("A?", INLINE, "B?", THOUGHT),
     "<|begin|><|User|>A?<|Assistant|>[[Red.<|end|>]]<|User|>B?<|Assistant|><think>\n[[Hm.\n</think>\n\nRed.<|end|>]]"),
    ("deepseek", chat("A?", "Hm.\n</think>\n\nRed."),
     "<|begin|><|User|>A?<|Assistant|><think>\n[[Hm.\n</think>\n\nRed.<|end|>]]"),
    ("chatml", chat("A?", "Hm.\n</think>\n\nRed."),
     IM_USER.format("A?") + IM_HEAD + "[[Hm.\n</think>\n\nRed.<|im_end|>]]\n"),
    ("deepseek", chat("A?", "Red."), "<|begin|><|User|>A?<|Assistant|><think>\n[[\n</think>\n\nRed.<|end|>]]"),
    ("deepseek", chat("A?", CALL, RESULT, ANSWER, "B?", "Red."),
     '<|begin|><|User|>A?<|Assistant|>[[<|call|>f{"a": "b"}<|end|>]]<|out|>{"c": 1}[[Two.<|end|>]]<|User|>B?<|Assistant|>'
     "<think>\n[[\n</think>\n\nRed.<|end|>]]"),
    ("glm", chat("A?", CALL, RESULT, ANSWER, "B?", THOUGHT),
     '<sop><|user|>\nA?<|assistant|>[[\n<think></think>\n<call>f</call>]]<|tool|>\n{"c": 1}<|assistant|>[[\n<think></think>\n'
     "Two.]]<|user|>\nB?<|assistant|>[[\n<think>Hm.</think>\nRed.]]"),
    ("gpt-oss", chat("A?", "Red.", "B?", THOUGHT),
     OSS + "<|start|>user<|message|>A?<|end|>" + FINAL + "Red.<|end|>]]<|start|>user<|message|>B?<|end|>"
     "<|start|>assistant[[<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Red."
     "<|return|>]]"),
    ("gpt-oss", chat({"role": "developer", "content": "Be kind."}, "A?", CALL, RESULT, ANSWER),
     OSS + "<|start|>developer<|message|># Instructions\n\nBe kind.<|end|><|start|>user<|message|>A?<|end|>"
     '<|start|>assistant[[ to=functions.f<|channel|>commentary json<|message|>{"a": "b"}<|call|>]]'
     '<|start|>functions to=assistant<|channel|>commentary<|message|>"{\\"c\\": 1}"<|end|>' + FINAL + "Two.<|return|>]]"),
    ("smollm3", chat("A?", "Red."),
     "<|im_start|>system\nToday: 26 July 2024\nReasoning: /think\n\n<|im_end|>\n" + IM_USER.format("A?") + IM_HEAD
     + "[[Red.<|im_end|>]]\n"),
    ("none", chat("A?", CALL, RESULT, ANSWER, tools=TOOLS),
     '### Functions\n{"type": "function", "function": {"name": "f", "parameters": {}}}\n\n### Instruction\nA?\n\n'
     '### Response\n[[<tool_call>{"name": "f", "arguments": {"a": "b"}}</tool_call></s>]]\n\n### Tool\n{"c": 1}\n\n'
     "### Response\n[[Two.</s>]]\n\n"),
    ("none", chat(SYSTEM, "A?", "Red.", "B?", "Blue."),
     "### Context\nBe kind.\n\n### Instruction\nA?\n\n### Response\n[[Red.</s>]]\n\n### Instruction\nB?\n\n"
     "### Response\n[[Blue.</s>]]\n\n"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "row", "expected"), ROWS, ids=lambda v: v if isinstance(v, str) and len(v) < 20 else ""
)
def test_what_the_assistant_writes_is_learned(name: str, row: dict[str, Any], expected: str) -> None:
    """The text is that of the whole conversation; each turn of the assistant is learned with its end."""
    assert expected == shown(encoder(name), row)


def test_each_template_of_the_table_is_seen() -> None:
    """None of them is there for nothing."""
    assert {*TEMPLATES} == {name for name, *_ in ROWS}


ASKED = [
    ("chatml", IM_HEAD, ["<|im_end|>", "<|endoftext|>"]),
    ("llama3", HEAD, ["<|eot_id|>", "<|eom_id|>"]),
    ("qwen3", IM_HEAD + "<think>\n\n</think>\n\n", ["<|im_end|>"]),
    ("qwen3.5", IM_HEAD + "<think>\n\n</think>\n\n", ["<|im_end|>"]),
    ("mistral", " [/INST]", ["</s>"]),
    ("gemma", "<start_of_turn>model\n", ["<end_of_turn>", "<eos>"]),
    ("phi3", "<|assistant|>\n", ["<|end|>", "<|endoftext|>"]),
    ("deepseek", "<|Assistant|><think>\n", ["<|end|>"]),
    ("glm", "<|assistant|>", ["<|user|>", "<|eos|>"]),
    ("gpt-oss", "<|start|>assistant", ["<|return|>", "<|call|>"]),
    ("smollm3", IM_HEAD, ["<|im_end|>"]),
    ("none", "### Response\n", ["</s>"]),
]


@pytest.mark.parametrize(("name", "head", "stops"), ASKED)
def test_a_model_is_asked_with_what_training_saw(name: str, head: str, stops: list[str]) -> None:
    """The prompt is the row's own beginning, and an answer ends where training taught it to, without a word
    of the template's."""
    made = encoder(name)
    sample = sample_of(chat("A?", "Red.", "B?", "Blue.", "C?"))[0]
    (row,) = made.encode(sample_of(chat("A?", "Red.", "B?", "Blue."))[0])
    prompt = made.prompt(sample)
    assert row.ids[: len(prompt)] == prompt
    assert made.tokenizer.decode(prompt).endswith(head)
    assert [made.tokenizer.convert_tokens_to_ids(stop) for stop in stops] == made.stops
    assert "Blue." == made.reader.answer([*row.ids[len(prompt) :], *prompt])


def test_what_is_said_by_a_template_of_channels_is_no_answer() -> None:
    """Neither its analysis nor the name of a channel."""
    made = encoder("gpt-oss")
    row = chat("A?", THOUGHT)
    (found,) = made.encode(sample_of(row)[0])
    assert "Red." == made.reader.answer(found.ids[len(made.prompt(sample_of(row)[0])) :])


def test_options_choose_what_is_learned() -> None:
    """The last answer alone, no reasoning, a system text, another template."""
    row = chat("A?", THOUGHT, "B?", INLINE)
    last = shown(encoder("chatml", Options(train_on="last", system="Be kind.")), row)
    assert last.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
    assert [f"[[{INLINE}<|im_end|>]]"] == re.findall(r"\[\[.*?]]", last, re.DOTALL)
    bare = shown(encoder("qwen3", Options(thinking="off")), row)
    assert "Hm." not in bare
    assert bare.endswith("Red.<|im_end|>]]\n")
    folded = encoder("gemma", Options(system="Be kind."))
    prompt = folded.tokenizer.decode(folded.prompt(sample_of(chat("A?", "Red."))[0]))
    asked = folded.template.asking().apply_chat_template(
        chat("A?")["messages"], tokenize=False, add_generation_prompt=True
    )
    assert prompt == asked
    other = shown(encoder("mistral", Options(template="chatml")), chat("A?", "Red."))
    assert "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n[[Red.</s>]]\n" == other


NOTED = [
    ("gemma", chat(SYSTEM, "A?", "Red."), "no system role"),
    ("qwen3", chat("A?", THOUGHT, "B?", "Blue."), "reasoning of earlier answers"),
    ("phi4", chat("A?", "Red.", tools=TOOLS), "functions"),
    ("glm", chat("A?", "Red."), "nothing teaches the model to stop"),
    ("chatml", chat("Is <|im_end|> an end?", "Red."), "tokens that begin or end turns"),
]


@pytest.mark.parametrize(("name", "row", "said"), NOTED)
def test_what_a_template_does_not_show_as_it_stands_is_said(
    name: str, row: dict[str, Any], said: str
) -> None:
    """Once, with the number of rows."""
    made = encoder(name)
    for _ in range(2):
        made.encode(sample_of(row)[0])
    assert [(True, 2)] == [(said in note, count) for note, count in made.notes.items()]


REFUSED = [
    ("chatml", chat("A?", SYSTEM, ANSWER), "does not take it: system comes first"),
    ("gemma", chat("A?", "Red.", ANSWER), "roles must alternate"),
    ("phi4", chat("A?", CALL), "does not write tool calls"),
    ("phi4", chat("A?", CALL | {"weight": 0}, "B?", "Red."), "does not write tool calls"),
    ("smollm3", chat("A?", "Red.", SYSTEM, "B?", ANSWER), "leaves out a turn of the role 'system'"),
    ("chatml", chat("A?", ANSWER | {"weight": 0}), "no turn is to be trained"),
    ("chatml", chat("A?", ANSWER | {"content": " "}), "an answer is empty"),
    ("chatml", chat("A?", ANSWER | {"content": "\ud800"}), "half a character"),
]


@pytest.mark.parametrize(("name", "row", "reason"), REFUSED)
def test_a_row_that_would_not_be_learned_as_it_stands_is_skipped(
    name: str, row: dict[str, Any], reason: str
) -> None:
    """With a reason that is the same for all of its kind."""
    with pytest.raises(Skip, match=reason):
        encoder(name).encode(sample_of(row, "x.jsonl:1")[0])


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no\x1b') }}", "{{ 1 / 0 }}", "nothing", "{% if %}"]
)
def test_a_template_that_cannot_write_an_answer_is_refused(template: str) -> None:
    """At once, with its own words and what to do."""
    with pytest.raises(DataError, match=r"cannot write a question and its answer .*--template") as caught:
        Encoder(bytes_tokenizer((), template))
    assert str(caught.value).isprintable()


def test_a_template_may_write_blanks_in_its_own_way() -> None:
    """As it may trim them; what it writes is learned. An answer that it shortens is not."""
    line = "{{ '<|im_start|>' + m.role + '\n' + SAID + '<|im_end|>\n' }}"
    each = f"{{%- for m in messages %}}{line}{{%- endfor %}}"
    opens = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
    specials = ("<|im_start|>", "<|im_end|>")
    made = [
        Encoder(bytes_tokenizer(specials, (each + opens).replace("SAID", said), eos_token="<|im_end|>"))
        for said in ("(m.content.split() | join(' '))", "m.content.replace('Or?', '')")
    ]
    row = chat("A?\n?", "Red.\n\nOr?", "B?", " Blue.")
    assert shown(made[0], row) == (
        IM_USER.format("A? ?") + IM_HEAD + "[[Red. Or?<|im_end|>]]\n" + IM_USER.format("B?") + IM_HEAD
        + "[[Blue.<|im_end|>]]\n"
    )  # fmt: skip
    with pytest.raises(Skip, match="changes what an answer says"):
        shown(made[1], row)


@pytest.mark.parametrize("fast", [True, False])
def test_a_row_does_not_begin_with_a_space_that_the_tokenizer_puts(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenized apart an answer would begin with U+2581; in its place it does not."""
    template, specials, names = TEMPLATES["mistral strict"]
    made = Encoder(sentencepiece_tokenizer(specials, template, **names))
    monkeypatch.setattr(type(made.tokenizer), "is_fast", fast)
    (row,) = made.encode(sample_of(chat("Name  a\u6771 colour.", "Red.", "One?", "Two?"))[0])
    first = next(i for i, t in enumerate(row.trained) if t)
    assert not made.tokenizer.convert_ids_to_tokens(row.ids[first]).startswith("\u2581")
    learned = [i for i, t in zip(row.ids, row.trained, strict=True) if t]
    assert "Red.</s>Two?</s>" == made.tokenizer.decode(learned).replace("</s> ", "</s>")


BORDER = (
    "{% for m in messages %}{{ ('Answer: ' if m.role == 'assistant' else 'Question: ') + m.content }}"
    "{{ '<|im_end|>' if m.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}"
)


@pytest.mark.parametrize("fast", [True, False])
def test_a_token_across_the_border_is_learned(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tokenizer does not say which characters a token has."""
    made = Encoder(merging_tokenizer(("<|im_end|>",), BORDER, eos_token="<|im_end|>"))
    monkeypatch.setattr(type(made.tokenizer), "is_fast", fast)
    (row,) = made.encode(sample_of(chat("One? \U0001f9d1\u200d\U0001f680", "Red. \u00e9\u6771"))[0])
    learned = [i for i, t in zip(row.ids, row.trained, strict=True) if t]
    assert " Red. \u00e9\u6771<|im_end|>" == made.tokenizer.decode(learned)
    assert (
        made.prompt(sample_of(chat("One?", "Red."))[0])
        == made.tokenizer("Question: One?\nAnswer:")["input_ids"]
    )


CUTS = [
    ({"prompt": "A" * 8, "completion": "R" * 99}, (38, False)),
    ({"prompt": "A" * 99, "completion": "Red."}, (5, True)),
    ({"prompt": "A" * 99, "completion": "R" * 99}, (48, False)),
]


@pytest.mark.parametrize(("row", "expected"), CUTS)
def test_a_long_row_is_cut_to_its_length(row: dict[str, str], expected: tuple[int, bool]) -> None:
    """A short answer stays whole behind a long prompt; a cut one has no end of turn."""
    made = encoder("phi4", max_length=64)
    (found,) = made.encode(sample_of(row)[0])
    learned = [i for i, t in zip(found.ids, found.trained, strict=True) if t]
    assert expected == (len(learned), learned[-1] == made.stops[0])
    assert (64, True) == (len(found.ids), found.cut > 0)


def test_every_token_of_a_text_is_learned() -> None:
    """But the first, which nothing comes before; a long text makes several rows."""
    made = encoder("chatml", max_length=16)
    found = made.encode(sample_of({"body": "x" * 40}, "", {"text": "body"})[0])
    assert [16, 16, 11] == [len(row.ids) for row in found]
    learned = [i for row in found for i, t in zip(row.ids, row.trained, strict=True) if t]
    assert "x" * 39 + "<|endoftext|>" == made.tokenizer.decode(learned)


def test_a_text_that_a_template_has_written_begins_and_ends_once() -> None:
    """The tokenizer's begin token is not put in front of another, nor the end token behind one."""
    made = encoder("mistral strict")
    begin = ("<s>", made.tokenizer.bos_token_id)
    made.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[begin])
    for text in ("<s>[INST] A? [/INST] Red.</s>\n", "Red."):
        (row,) = made.encode(sample_of({"text": text}, "", {"text": "text"})[0])
        tokens = made.tokenizer.convert_ids_to_tokens(row.ids)
        assert (1, 1) == (tokens.count("<s>"), tokens.count("</s>"))


LONG = chat(
    SYSTEM, "One?", "1" * 20, "Two?", "2" * 20, "Three?", "3" * 90, "Four?", "4" * 20, "Five?", "5" * 400
)


@pytest.mark.parametrize("name", ["chatml", "qwen3", "mistral", "llama3"])
def test_later_answers_of_a_long_conversation_have_rows_of_their_own(name: str) -> None:
    """Each is learned once; a later row is what the template writes of the system text and the last turns."""
    made = encoder(name, max_length=200)
    found = made.encode(sample_of(LONG)[0])
    learned = [[i for i, t in zip(row.ids, row.trained, strict=True) if t] for row in found]
    texts = ["".join(c for c in made.tokenizer.decode(ids) if c.isdigit()) for ids in learned]
    cut = texts.pop()
    assert "1" * 20 + "2" * 20 + "3" * 90 + "4" * 20 == "".join(texts) and {"5"} == {*cut}
    assert learned[-1][-1] not in made.stops
    (alone,) = encoder(name, max_length=200).encode(sample_of(chat(SYSTEM, "Five?", "5" * 400))[0])
    assert alone.ids == found[-1].ids
    assert max(len(row.ids) for row in found) <= 200
    assert [("split into several rows" in note, count) for note, count in made.notes.items()][-1:] == [
        (True, 1)
    ]


PLACED = [
    ("chatml", chat("Say <|im_start|>assistant", "Red.", "B?", "Blue.")),
    ("mistral", chat(SYSTEM, "A [/INST] Red.</s>", "Red.", "B?", " Red.")),
    ("gemma", chat("Red.", " Red.\n", "Blue.", "Red.")),
    ("qwen3", chat("A?", THOUGHT, "B?", "Red.")),
    ("deepseek", chat("A?", CALL, RESULT, ANSWER, "B?", "Two.")),
    ("gpt-oss", chat("A?", "Red.", "B?", "Red.")),
]


@pytest.mark.parametrize(("name", "row"), PLACED)
def test_what_is_read_off_is_what_differs(
    name: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short ways to the places of answers lead where replacing one after the other leads."""
    quick = shown(encoder(name), row)
    monkeypatch.setattr(answers, "_read_off", lambda *_: [])
    assert quick == shown(encoder(name), row)
    monkeypatch.setattr(answers, "_replaced", lambda *_: ())
    assert quick == shown(encoder(name), row)


@pytest.mark.parametrize(("name", "times"), [("chatml", 1), ("mistral", 2)])
def test_a_plain_conversation_is_rendered_once(
    name: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many answers it has; without heads twice."""
    made, calls = encoder(name), list[int]()
    render = made.template.render_marked
    monkeypatch.setattr(made.template, "render_marked", lambda *a, **b: calls.append(1) or render(*a, **b))
    made.encode(sample_of(chat("A?", "Red.", "B?", "Blue.", "C?", "Grey."))[0])
    assert times == len(calls)
