# ruff: noqa: E501 (tables of rows)
"""Every shape of a row becomes the same conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from budgetsearch.core.errors import SettingsError
from budgetsearch.training.data.conversation import Conversation, Skip, Text, Turn, from_json, to_json
from budgetsearch.training.data.shapes import parse_columns, sample_of

PLAIN = [Turn("user", "Q"), Turn("assistant", "A")]
KIND = [Turn("system", "S"), *PLAIN]
MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLED = [Turn("user", "Q"), Turn("assistant", tool_calls=(CALL,)), Turn("tool", "R"), Turn("assistant", "A")]
CONTEXT = [
    Turn("user", "Q"),
    Turn("assistant", "B", trained=False),
    Turn("user", "C"),
    Turn("assistant", "A"),
]


def called(call: Any) -> dict[str, Any]:
    """A row with this message in the place of a call."""
    return {"messages": [MESSAGES[0], call, {"role": "tool", "content": "R"}, MESSAGES[1]]}


def sharegpt(*pairs: tuple[str, str], **beside: Any) -> dict[str, Any]:
    """A row of conversations."""
    return {"conversations": [{"from": who, "value": text} for who, text in pairs], **beside}


SHAPES = [
    ({"messages": MESSAGES}, {}, PLAIN),
    ({"messages": json.dumps(MESSAGES)}, {}, PLAIN),
    ({"conversation": MESSAGES, "system": "S"}, {}, KIND),
    ({"talk": MESSAGES}, {"messages": "talk"}, PLAIN),
    (sharegpt(("Human ", "Q"), (" GPT", "A")), {}, PLAIN),
    (sharegpt(("system", " "), ("human", "Q"), ("gpt", "A"), system="S"), {}, KIND),
    (
        sharegpt(("human", "Q"), ("function_call", json.dumps(CALL["function"])), ("observation", "R"), ("gpt", "A")),
        {},
        CALLED,
    ),
    (called({"role": "assistant", "content": None, "tool_calls": [CALL]}), {}, CALLED),
    (called({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}), {}, CALLED),
    (called({"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}}), {}, CALLED),
    (called({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1, "b": None}}}]}), {}, CALLED),
    ({"prompt": "Q", "completion": "A"}, {}, PLAIN),
    ({"query": "Q", "response": "A"}, {}, PLAIN),
    ({"problem": "Q", "solution": "A"}, {}, PLAIN),
    ({"messages": str(MESSAGES)}, {}, PLAIN),
    ({"prompt": json.dumps(MESSAGES[:1]), "completion": str(MESSAGES[1:])}, {}, PLAIN),
    ({"prompt": "[Q]", "completion": "[{'a': 1}]"}, {}, [Turn("user", "[Q]"), Turn("assistant", "[{'a': 1}]")]),
    ({"conversations": [{"from": "user", "text": "Q"}, {"from": "bot", "text": "A"}]}, {}, PLAIN),
    ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "Q"}]},
                   {"role": "assistant", "content": [{"type": "output_text", "text": "A"}]}]}, {}, PLAIN),
    ({"messages": [MESSAGES[0], {"role": "tool_call", "content": json.dumps(CALL["function"])},
                   {"role": "tool_response", "content": "R"}, MESSAGES[1]]}, {}, CALLED),
    ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:], "system": ""}, {}, PLAIN),
    ({"prompt": [*MESSAGES[:1], {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}], "completion": "A"}, {}, CONTEXT),
    ({"instruction": "Q", "input": "", "output": "A", "system": "S"}, {}, KIND),
    ({"instruction": "Q", "input": "I", "output": "A"}, {}, [Turn("user", "Q\n\nI"), PLAIN[1]]),
    ({"instruction": "C", "output": "A", "history": [["Q", "B"]]}, {}, [PLAIN[0], Turn("assistant", "B"), Turn("user", "C"), PLAIN[1]]),
    ({"question": "Q", "answer": "A", "id": 3}, {}, PLAIN),
    ({"input": "Q", "target": "A"}, {}, PLAIN),
    ({"inputs": "Q", "targets": "A"}, {}, PLAIN),
    ({"instruction": "Q", "output": "A", "prompt": "Below: Q. Response: A"}, {}, PLAIN),
    ({"question": "Q", "answer": "A", "prompt": "P", "turns": MESSAGES}, {}, PLAIN),
    ({"prompt": "Q", "answer": "A"}, {}, PLAIN),
    ({"instruction": "Q", "context": "", "answer": "A"}, {}, PLAIN),
    ({"user": "Q", "assistant": "A", "source": "web"}, {}, PLAIN),
    ({"article": "Q", "highlights": "A", "id": "1"}, {}, PLAIN),
    ({"dialogue": "Q", "summary": "A"}, {}, PLAIN),
    ({"dialogue": MESSAGES, "summary": "S"}, {}, PLAIN),
    ({"Question": "Q", "Answer ": "A", "ID": 3}, {}, PLAIN),
    ({"Instruction": "Q", "Input": "I", "OUTPUT": "A"}, {}, [Turn("user", "Q\n\nI"), PLAIN[1]]),
    ({"Prompt": "Q", "Response": "A", "System Prompt": "S"}, {}, KIND),
    ({"Messages": MESSAGES}, {}, PLAIN),
    ({"ask": "Q", "reply": "A", "who": "S"}, {"prompt": "ask", "completion": "reply", "system": "who"}, KIND),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, {"completion": "chosen"}, PLAIN),
    ({"prompt": "Q", "chosen": MESSAGES, "rejected": []}, {"completion": "chosen"}, PLAIN),
    ({"chosen": MESSAGES, "rejected": []}, {"completion": "chosen"}, PLAIN),
    ({"question": 1, "answer": False}, {}, [Turn("user", "1"), Turn("assistant", "false")]),
    ({"question": 0.5, "answer": 0}, {}, [Turn("user", "0.5"), Turn("assistant", "0")]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}, MESSAGES[1]]},
     {}, [Turn("user", "a b"), PLAIN[1]]),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning_content": "T"}]}, {}, [PLAIN[0], Turn("assistant", "A", "T")]),
    ({"messages": [*MESSAGES, *MESSAGES[:1], {**MESSAGES[1], "weight": 0}]}, {}, [*PLAIN, PLAIN[0], Turn("assistant", "A", trained=False)]),
    *(({"messages": [MESSAGES[0], {**MESSAGES[1], switch: off}, *MESSAGES]}, {}, [PLAIN[0], Turn("assistant", "A", trained=False), *PLAIN])
      for switch, off in (("training", False), ("trainable", False), ("loss", False), ("loss_weight", 0.0))),
    # lists of pairs, of texts in turn, and of nothing but columns
    *(({"conversation": talk, "source": "web"}, {}, [*PLAIN, *PLAIN])
      for talk in ([{"input": "Q", "output": "A"}] * 2, ["Q", "A", "Q", "A"], [["Q", "A"]] * 2, '["Q", "A", "Q", "A"]',
                   {"from": ["human", "gpt"] * 2, "value": ["Q", "A"] * 2})),
    ({"systemInstruction": {"parts": [{"text": "S"}]}, "contents": [{"role": "user", "parts": [{"text": "Q"}]},
      {"role": "model", "parts": [{"text": "A"}]}]}, {}, KIND),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": CALL["function"]},
                        {"from": "observation", "value": "R"}, {"from": "gpt", "value": "A"}]}, {}, CALLED),
    ({"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": {"b": "\u00e9"}}, MESSAGES[1]]},
     {}, [*CALLED[:2], Turn("tool", '{"b": "\u00e9"}'), CALLED[3]]),
    *(({"query": "Q", "answers": answers, "tools": '[{"name": "f"}]', "id": 1}, {}, CALLED[:2])
      for answers in ([CALL["function"]], json.dumps([CALL["function"]]))),
    # preference data of which one answer is wanted
    ({"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"}, "rejected": {}},
     {"prompt": "conversations", "completion": "chosen"}, PLAIN),
    ({"chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q\n\nAssistant: A", "rejected": ""}, {"completion": "chosen"}, PLAIN * 2),
    ({"prompt": "Q", "completion": "A", "label": "True"}, {}, PLAIN),
    ({"body": "Q", "label": False}, {"prompt": "body", "completion": "label"}, [PLAIN[0], Turn("assistant", "false")]),
    # what belongs to a question, and to an answer
    ({"question": "Q", "context": "C", "answer": "A"}, {}, [Turn("user", "Q\n\nC"), PLAIN[1]]),
    ({"question": "Q", "context": ["C", "D"], "answer": "A"}, {}, [Turn("user", "Q\n\nC\n\nD"), PLAIN[1]]),
    ({"question": "Q", "context": "C", "answers": {"text": ["A", "B"]}},
     {"prompt": "question", "input": "context", "completion": "answers.text.0"}, [Turn("user", "Q\n\nC"), PLAIN[1]]),
    ({"question": "Q", "reasoning": "T U", "answer": "A"}, {}, [PLAIN[0], Turn("assistant", "A", "T U")]),
    ({"question": "Q", "reasoning": "on", "answer": "A"}, {}, PLAIN),
    ({"question": "Q", "thinking": "T U", "answer": "<think>V</think>A"}, {}, [PLAIN[0], Turn("assistant", "<think>V</think>A")]),
    (called({**MESSAGES[1], "function_call": {"name": None, "arguments": None}, "tool_calls": [{"function": {"name": None}}]}),
     {}, [PLAIN[0], PLAIN[1], Turn("tool", "R"), PLAIN[1]]),
    ({"question": "Q", "cot": "T", "answer": "A"}, {"prompt": "question", "completion": "answer", "reasoning": "cot"},
     [PLAIN[0], Turn("assistant", "A", "T")]),
    ({"translation": {"en": "Q", "de": "A"}}, {"prompt": "translation.en", "completion": "translation.de"}, PLAIN),
    ({"body": {"messages": MESSAGES}, "id": 1}, {"messages": "body.messages"}, PLAIN),
    ({"body": json.dumps({"messages": MESSAGES})}, {"messages": "body.messages"}, PLAIN),
    ({"messages": [json.dumps(message) for message in MESSAGES]}, {}, PLAIN),
    ({"a.b": "Q", "a": {"b": "R"}, "c": "A"}, {"prompt": "a.b", "completion": "c"}, PLAIN),
    # a table of rows of several shapes has the columns of all of them
    ({"instruction": None, "output": None, "question": "Q", "answer": "A"}, {}, PLAIN),
    ({"prompt": "", "completion": "", "article": "Q", "highlights": "A"}, {}, PLAIN),
    ({"prompt": None, "completion": None, "dialog": MESSAGES}, {}, PLAIN),
    ({"instruction": None, "input": "Q", "output": "A"}, {}, PLAIN),
    ({"prompt": "Q", "completion": None, "response": "A"}, {}, PLAIN),
    ({"prompt": "Q", "completion": "A", "image": "https://x/y.png", "images": []}, {}, PLAIN),
]  # fmt: skip


@pytest.mark.parametrize(("row", "columns", "turns"), SHAPES, ids=range(len(SHAPES)))
def test_a_row_of_any_shape_is_a_conversation(
    row: dict[str, Any], columns: dict[str, str], turns: list[Turn]
) -> None:
    """Which also goes through JSON and comes back."""
    sample, used = sample_of(row, "x.jsonl:1", columns)
    assert isinstance(sample.body, Conversation)
    assert tuple(turns) == sample.body.turns
    assert bool(sample.body.tools) == ("tools" in row)
    assert used <= {*row}
    assert sample == from_json(json.loads(json.dumps(to_json(sample))))


def test_columns_that_are_spelled_otherwise_are_used_under_their_own_names() -> None:
    """So what is not used can be named as it stands; a name that is exact comes first."""
    assert {"Question", "ANSWER"} == sample_of({"Question": "Q", "ANSWER": "A", "Id": 1})[1]
    sample, used = sample_of({"question": "Q", "answer": "A", "Answer": "B"})
    assert (Conversation(tuple(PLAIN)), {"question", "answer"}) == (sample.body, used)


def test_functions_and_other_columns_are_told_apart() -> None:
    """Functions reach the conversation wrapped, from a list or from its JSON; what is not used can be named."""
    bare = {"name": "f", "parameters": {"x": None}}
    sample, used = sample_of({"messages": MESSAGES, "tools": json.dumps([bare]), "id": 1})
    assert isinstance(sample.body, Conversation)
    assert ({"type": "function", "function": {"name": "f", "parameters": {}}},) == sample.body.tools
    assert {"messages", "tools"} == used
    flat = sample_of({"messages": MESSAGES, "tools": [{"type": "function", **bare}]})[0]
    assert sample.body == flat.body
    assert Conversation(tuple(PLAIN)) == sample_of({"messages": MESSAGES, "tools": "null"})[0].body


def test_raw_text_has_to_be_asked_for() -> None:
    """It is no conversation, and the message says how."""
    row = {"text": "Once."}
    assert Text("Once.") == sample_of(row, "", parse_columns("text=text"))[0].body
    with pytest.raises(Skip, match="--columns text=text"):
        sample_of(row)


SKIPS = [
    ({"prompt": "Q", "completion": None}, "'completion' is empty"),
    ({"prompt": " ", "completion": "A"}, "'prompt' is empty"),
    ({"prompt": "Q", "completion": float("nan")}, "'completion' is empty"),
    ({"prompt": "Q", "completion": {"a": 1}}, "'completion' is no text"),
    ({"prompt": "Q", "completion": "A", "label": False}, "preference data"),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "--columns completion=chosen"),
    ({"body": "Q", "label": 1}, "found: body, label; .*--columns"),
    ({"Body": "Q", "Label": 1}, "found: Body, Label; .*--columns"),
    ({"Question": "Q", "Answer": ""}, "'answer' is empty"),
    ({"messages": []}, "'messages' is empty"),
    ({"messages": "hello"}, "no JSON"),
    ({"messages": MESSAGES[:1]}, "no turn of the assistant"),
    ({"messages": [{"role": "narrator", "content": "Q"}, MESSAGES[1]]}, "'narrator'"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, MESSAGES[1]]}, "the kind 'image'"),
    (called({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}), "no JSON"),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0.5}]}, "neither 0 nor 1"),
    ({"instruction": "Q", "output": "A", "history": [["Q"]]}, "no list of pairs"),
    ({"instruction": "", "input": "I", "output": "A"}, "'instruction' is empty"),
    ({"messages": MESSAGES, "label": False}, "preference data"),
    ({"prompt": "Q", "completion": "A", "label": "False"}, "preference data"),
    ({"messages": MESSAGES[:1], "chosen": MESSAGES[1], "rejected": MESSAGES[1]}, "prompt=messages,completion=chosen"),
    ({"input": {"messages": MESSAGES[:1]}, "preferred_output": MESSAGES[1:], "non_preferred_output": MESSAGES[1:]},
     "prompt=input.messages,completion=preferred_output"),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "train_detail": [{"begin_offset": 0, "end_offset": 0, "train": True}]}]}, "only whole messages"),
    ({"messages": [{"speaker": "user", "text": "Q"}, MESSAGES[1]]}, "no role, only speaker, text"),
    ({"messages": [{"role": "user", "content": "<image>Q"}, MESSAGES[1]], "images": ["a.png"]}, "'images' belongs to it"),
    ({"conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}], "image": "a.png"}, "'image' belongs to it"),
    ({"question": "Q", "answer": "A", "image": {"bytes": "x"}}, "'image' belongs to it"),
    ({"query": "Q", "answers": ["A"], "tools": [{"name": "f"}]}, "found: query, answers, tools"),
    ({"query": "Q", "answers": [CALL["function"]]}, "found: query, answers"),
    ({"question": "Q", "answer": ["A", "B"]}, "several texts; .* answer.0"),
    ({"question": "Q", "choices": ["A", "B"], "answer": 1}, "without its 'choices'"),
    ({"question": "Q", "context": {"title": ["T"]}, "answer": "A"}, "'context' belongs to the question"),
    ({"translation": {"en": "Q", "de": "A"}}, r"found: translation \(translation.en, translation.de\)"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), SKIPS, ids=range(len(SKIPS)))
def test_a_row_that_cannot_be_used_says_why(row: dict[str, Any], reason: str) -> None:
    """The reason names no row, so that rows can be counted by it; the exception does."""
    with pytest.raises(Skip, match=reason) as caught:
        sample_of(row, "x.jsonl:1")
    assert "x.jsonl" not in caught.value.reason
    assert str(caught.value).startswith("x.jsonl:1: ")


@pytest.mark.parametrize("text", ["question", "ask=question", "prompt=", "text=a,prompt=b"])
def test_columns_that_cannot_be_meant_are_refused(text: str) -> None:
    """The message shows how they are written."""
    with pytest.raises(SettingsError, match="--columns"):
        parse_columns(text)


def test_a_column_that_is_not_there_is_named() -> None:
    """With those that are; what is empty in a column that is there is no missing column."""
    with pytest.raises(Skip, match=r"no column 'reply'.*found: ask"):
        sample_of({"ask": "Q"}, "", parse_columns("prompt=ask,completion=reply"))
    for row in ({"talk": {"ask": "Q"}}, {"talk": None}):
        with pytest.raises(Skip, match=r"'talk.*' is empty"):
            sample_of(row, "", parse_columns("prompt=talk.ask,completion=talk.reply"))
    with pytest.raises(Skip, match=r"no column of a question .*--columns prompt=COLUMN,completion=chosen"):
        sample_of({"chosen": "A", "rejected": "B"}, "", parse_columns("completion=chosen"))
