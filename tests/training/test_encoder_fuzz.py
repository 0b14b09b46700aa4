"""Whatever a row holds, under every template: its answers are learned, or it says why not."""

from __future__ import annotations

import functools
import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from budgetsearch.training.data.conversation import Conversation, Skip, Turn, split_thought
from budgetsearch.training.data.encoder import Encoder
from budgetsearch.training.data.shapes import sample_of
from budgetsearch.training.data.templates import Options
from tests.support.chat_templates import TEMPLATES
from tests.support.tokenizers import bytes_tokenizer

MARKS = sorted({mark for _, specials, _ in TEMPLATES.values() for mark in specials})
PIECES = (
    *("a", "B", " ", "\n", "\r\n", "\t", ".", "{{ x }}", "{% if %}", "\x00", "\ue000", "\u00e9"),
    *("e\u0301", "\ud800", "\U0001f9d1\u200d\U0001f680", "\u05de", "\\", '"', "assistant", "### Response\n"),
    *("budgetsearch probe", "<think>", "</think>", "<think>\n\n</think>\n\n", *MARKS),
)
WORDS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
PLAIN = st.text(alphabet="abc \n.\u00e9\u6771\U0001f600", min_size=1, max_size=12)
INNER = ("role", "content", "type", "text", "name", "from", "value", "function", "arguments", "weight")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | WORDS,
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.sampled_from(INNER), one, max_size=3),
    max_leaves=6,
)
KEYS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
    "text",
    "question",
    "answer",
)
TEMPLATE = st.sampled_from(sorted(TEMPLATES))


@functools.cache
def encoder(name: str, length: int | None = None, thinking: Any = "keep") -> Encoder:
    """One for all examples."""
    template, specials, names = TEMPLATES[name]
    return Encoder(bytes_tokenizer(specials, template, **names), Options(thinking=thinking), length)


@settings(max_examples=100, deadline=None)
@given(name=TEMPLATE, row=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_nothing_but_a_reason_comes_out_of_a_row_of_anything(name: str, row: dict[str, Any]) -> None:
    """Neither a traceback nor a row without anything to learn."""
    try:
        for found in encoder(name, 32).encode(sample_of(row, "x:1")[0]):
            assert any(found.trained)
            assert len(found.ids) == len(found.trained) <= 32
    except Skip as skip:
        reason = skip.reason
    else:
        reason = "none"
    assert reason.isprintable()
    assert 0 < len(reason) < 600


def used(name: str, value: str, said: str) -> list[dict[str, Any]]:
    """A call and what comes of it."""
    call = {"function": {"name": name, "arguments": {"a": value}}}
    return [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": said}]


def talks(words: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Messages: questions and answers, some with reasoning, with calls, or without a loss."""
    ask = words.map(lambda text: [{"role": "user", "content": text}])
    beside = {"weight": st.sampled_from([0, 1]), "reasoning_content": words}
    answer = st.fixed_dictionaries({"role": st.just("assistant"), "content": words}, optional=beside)
    uses = st.just([]) | st.builds(used, st.sampled_from(["f", "look_up"]), words, words)
    turn = st.builds(lambda a, b, c: [*a, *b, c], ask, uses, answer)
    system = st.just([]) | words.map(lambda text: [{"role": "system", "content": text}])
    turns = st.lists(turn, min_size=1, max_size=3)
    return st.builds(lambda s, many: [*s, *itertools.chain(*many)], system, turns)


def learned(made: Encoder, ids: list[int], trained: list[int]) -> list[list[int]]:
    """The ids of each stretch that is learned."""
    found: list[list[int]] = []
    for token, before, now in zip(ids, [0, *trained], trained, strict=False):
        if now:
            found += [[]] if not before else []
            found[-1].append(token)
    return found


def answers(talk: Conversation) -> list[Turn]:
    """The turns to learn."""
    return [talk.turns[i] for i in talk.trained()]


@settings(max_examples=200, deadline=None)
@given(name=TEMPLATE, thinking=st.sampled_from(["keep", "off"]), messages=talks(PLAIN))
def test_what_is_learned_is_what_the_assistant_says(
    name: str, thinking: str, messages: list[dict[str, Any]]
) -> None:
    """Each turn of it, in order, with its end, and nothing of what others say."""
    made = encoder(name, None, thinking)
    try:
        sample = sample_of({"messages": messages})[0]
        (found,) = made.encode(sample)
    except Skip:
        return
    assert isinstance(sample.body, Conversation)
    turns, parts = answers(sample.body), learned(made, found.ids, found.trained)
    assert len(turns) == len(parts)
    for turn, part in zip(turns, parts, strict=True):
        if turn.tool_calls:
            assert turn.tool_calls[0]["function"]["name"] in made.tokenizer.decode(part)
        else:
            assert turn.content.strip() == made.reader.answer(part)
        known = made.template.known
        assert not known.stop or made.tokenizer.decode(part[-1:]) in known.ends
    prompt = made.prompt(sample)
    if sample.body.turns[-1].role == "assistant" and turns[-1] == sample.body.turns[-1]:
        assert found.ids[: len(prompt)] == prompt


@settings(max_examples=100, deadline=None)
@given(name=TEMPLATE, messages=talks(WORDS), length=st.sampled_from([8, 24, 60]))
def test_text_that_looks_like_a_template_is_text(
    name: str, messages: list[dict[str, Any]], length: int
) -> None:
    """Special tokens, think blocks and Jinja in a row neither move what is learned nor break anything."""
    made, short = encoder(name), encoder(name, length)
    try:
        sample = sample_of({"messages": messages})[0]
        (found,) = made.encode(sample)
        cuts = short.encode(sample)
    except Skip:
        return
    assert isinstance(sample.body, Conversation)
    told = made.tokenizer.decode([i for i, t in zip(found.ids, found.trained, strict=True) if t])
    for turn in answers(sample.body):
        assert split_thought(turn)[1].strip() in told
    assert 1 <= len(cuts) <= len(answers(sample.body))
    assert all(len(cut.ids) <= length and any(cut.trained) for cut in cuts)
