"""The model's chat template as a program of a stranger's: what it takes, what it writes around an answer.

All of it is found by rendering probes once; a row is then given to the template in the form that it takes.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from budgetsearch.core.errors import DataError
from budgetsearch.training.data.conversation import Conversation, Skip, Turn, split_thought

DAY = datetime.datetime(2024, 7, 26)
"""Today, for every template that asks: rows must not depend on the day of the run."""
VALUES: Mapping[str, Any] = {"date_string": f"{DAY:%d %b %Y}"}
PROBE, ASK, THOUGHT = "budgetsearch probe", "budgetsearch asks", "budgetsearch thinks"
X = "\U0010fffdbudgetsearch\U0010fffd"
"""Stands for an answer; begins and ends with what no text begins or ends with, and no template trims."""
BLOCK = re.compile(r"\s*(<think>\s*)?(</think>\s*)?")
"""A think block that holds nothing, or one of its ends."""
AT_END = re.compile(r"(<think>\s*)?(</think>\s*)?\Z")
OPEN = re.compile(r"\s*<think>\s*")
FOLDED = "the chat template has no system role: the system text stands in front of the first user turn"
SAID = 160
"""Characters of a template's own complaint."""

OWN = """\
{{- BOS }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '### Response\\n' }}{% generation %}{{- message.content + EOS }}{% endgeneration %}{{- '\\n\\n' }}
    {%- elif message.role in ('system', 'user') %}
        {{- ('### Context' if message.role == 'system' else '### Instruction') + '\\n' }}
        {{- message.content + '\\n\\n' }}
    {%- else %}
        {{- '### ' + (message.role | title) + '\\n' + message.content + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response\\n' }}{%- endif %}
"""
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + EOS }}{%- endgeneration %}{{- '\\n' }}
    {%- else %}{{- message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
NAMED = {"none": OWN, "chatml": CHATML}


@dataclass(frozen=True)
class Options:
    """How rows become tokens, beside the model's own files."""

    template: str | None = None
    """None: the model's own. Else a name of ``NAMED``, or the path of a Jinja file."""
    system: str = ""
    """The system text of rows that have none."""
    thinking: Literal["keep", "on", "off"] = "keep"
    train_on: Literal["all", "last"] = "all"


@dataclass
class Template:
    """A tokenizer's chat template and what is known about it."""

    tokenizer: Any
    options: Options = field(default_factory=Options)
    notes: Counter[str] = field(default_factory=Counter)
    """What was done to rows beside rendering them, and to how many."""

    def __post_init__(self) -> None:
        """Find out what the template takes.

        Raises:
            DataError: it does not even take a question and an answer.
        """
        self.own = self.options.template == "none" or not (
            self.options.template or self.tokenizer.chat_template
        )
        if self.own or self.options.template:
            self.tokenizer.chat_template = self._chosen()
        self.source = self.tokenizer.chat_template
        tokens = [str(t) for t in self.tokenizer.added_tokens_decoder.values()]
        tokens += self.tokenizer.all_special_tokens
        longest_first = sorted({*tokens} - {""}, key=len, reverse=True)
        self.marks = re.compile("|".join(map(re.escape, longest_first)) or r"\b\B")
        self.parts = False
        self._look()

    # ------------------------------------------------------------------------- rendering

    def render(self, chat: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), **options: Any) -> str:
        """The chat as a text.

        Raises:
            Skip: the template does not take it.
        """
        return self.render_marked(chat, tools, marked=False, **options)[0]

    def render_marked(
        self, chat: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *,
        prompt: bool = False, thinking: bool | None = None, marked: bool = True,
    ) -> tuple[str, list[tuple[int, int]]]:  # fmt: skip
        """The chat as a text, and where its ``{% generation %}`` blocks begin and end."""
        from transformers.utils import chat_template_utils

        values = {**self.tokenizer.special_tokens_map, **VALUES}
        asked = {"on": True, "off": False, "keep": thinking}[self.options.thinking]
        if asked is not None:
            values["enable_thinking"] = asked
        if self.parts:
            chat = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]

        def work() -> tuple[str, list[tuple[int, int]]]:
            source = self.tokenizer.get_chat_template(None, tools or None)
            compiled = chat_template_utils._compile_jinja_template(source)
            compiled.environment.globals["strftime_now"] = DAY.strftime
            texts, found = chat_template_utils.render_jinja_template(
                conversations=[list(chat)], tools=list(tools) or None, chat_template=source,
                return_assistant_tokens_mask=marked, add_generation_prompt=prompt, **values,
            )  # fmt: skip
            return texts[0], found[0] if found else []

        try:
            return work()
        except Exception as error:  # a template is a stranger's program: it may divide by zero or call itself
            said = " ".join(str(error).split()) or type(error).__name__
            raise Skip(f"the chat template does not take it: {_shown(said)}") from None

    def chat(self, talk: Conversation) -> list[dict[str, Any]]:
        """The turns as the template takes them.

        Raises:
            Skip: there is no user turn to put the system text into.
        """
        turns = list(talk.turns)
        if self.options.system and not any(t.role in ("system", "developer") for t in turns):
            turns.insert(0, Turn("system", self.options.system))
        if not self.knows_system and turns[0].role in ("system", "developer"):
            turns = self._folded(turns)
        return [self._message(turn) for turn in turns]

    def has_markers(self) -> bool:
        """Whether it says itself what the assistant writes."""
        return bool(re.search(r"\{%-?\s*generation\s*-?%\}", str(self.source)))

    def used(self) -> str:
        """The template that asks as training asked, where that is not the tokenizer's own; else nothing."""
        before = ""
        if self.options.thinking != "keep":
            value = json.dumps(self.options.thinking == "on")
            before += f"{{%- set enable_thinking = enable_thinking | default({value}) %}}\n"
        if self.options.system:
            turn = f"{{'role': 'system', 'content': {json.dumps(self.options.system)}}}"
            before += f"{{%- if messages[0].role != 'system' %}}{{%- set messages = [{turn}] + messages %}}"
            before += "{%- endif %}\n"
        if not before and not self.own and not self.options.template:
            return ""
        source = self.source if isinstance(self.source, str) else self.source["default"]
        return before + source

    def _folded(self, turns: list[Turn]) -> list[Turn]:
        if len(turns) < 2 or turns[1].role != "user":
            raise Skip("the chat template has no system role, and no user turn follows the system text")
        self.notes[FOLDED] += 1
        content = f"{turns[0].content}\n\n{turns[1].content}"
        return [Turn("user", content, about=turns[1].about), *turns[2:]]

    def _message(self, turn: Turn) -> dict[str, Any]:
        role = "system" if turn.role == "developer" and not self.knows_developer else turn.role
        content, thought = self._thought(turn)
        message: dict[str, Any] = {"role": role, "content": content, **turn.about}
        if thought:
            message["reasoning_content"] = thought
        if turn.tool_calls:
            message["tool_calls"] = list(turn.tool_calls)
        return message

    def _thought(self, turn: Turn) -> tuple[str, str]:
        """The content as the template takes it, and the reasoning that it takes beside it."""
        thought, bare = split_thought(turn)
        mode = "off" if self.options.thinking == "off" else self.reasoning
        if mode == "off" and thought:
            self.notes["reasoning is left out (--thinking off)"] += 1
        if mode in ("off", "insert"):
            return bare, ""
        if mode == "inline":
            return f"<think>\n{thought}\n</think>\n\n{bare}" if turn.reasoning else turn.content, ""
        return (bare, thought) if turn.reasoning or not self.parses else (turn.content, "")

    # --------------------------------------------------------------------------- probing

    def _chosen(self) -> str:
        name = self.options.template or "none"
        if name not in NAMED:
            try:
                return Path(name).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                known = ", ".join(NAMED)
                raise DataError(
                    f"--template {name}: neither one of {known} nor a file that can be read ({error})"
                ) from None
        begins = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        end = self.tokenizer.eos_token or ""
        if name == "chatml" and "<|im_end|>" in self.tokenizer.get_vocab():
            end = "<|im_end|>"
        source = NAMED[name].replace("BOS", json.dumps(self.tokenizer.bos_token if begins else ""))
        return source.replace("EOS", json.dumps(end))

    def _look(self) -> None:
        ask, answer = _said("user", ASK), _said("assistant", PROBE)
        self.knows_system = self.knows_developer = True
        whole = self._shown([ask, answer])
        if whole is None:
            self.parts = True  # content as a list of parts, as models with pictures have it
            whole = self._shown([ask, answer])
        if whole is None:
            self.parts = False
            try:
                self.render([ask, answer])
            except Skip as skip:
                raise DataError(f"{skip.reason}; {ADVICE}") from None
            raise DataError(f"The chat template does not show a question and its answer; {ADVICE}")
        self._look_at_heads(ask, whole)
        system = self._try([_said("system", THOUGHT), ask], prompt=True)
        self.knows_system = THOUGHT in (system or "")
        self.knows_developer = "developer" in str(self.source)
        self._look_at_thoughts(ask)

    def _look_at_heads(self, ask: dict[str, Any], whole: str) -> None:
        """Head of an answer, what may stand between it and the answer, and what ends a turn."""
        answer = _said("assistant", PROBE)
        plain, opened = self._try([ask]) or "", self._try([ask], prompt=True) or ""
        head = opened[same_start(plain, opened) :]
        cut = AT_END.search(head)
        self.head = head[: cut.start()] if cut else head
        self.opens = bool(OPEN.fullmatch(head[len(self.head) :]))
        at = whole.index(PROBE)
        before = whole.rfind(self.head, 0, at) if self.head else same_start(plain, whole)
        self.leads = [whole[before + len(self.head) : at]] if before >= 0 else []
        after = whole[at + len(PROBE) :]
        first = self.marks.search(after)
        self.end = after[: first.end()] if first else after.rstrip()
        self.stop = first.group() if first else ""
        """The token that ends an answer; none if it is no token of its own."""
        self.ends = {self.stop or self.end} - {""}
        history = self._try([ask, answer, _said("user", THOUGHT), _said("assistant", "?")]) or ""
        if PROBE in history and (found := self.marks.search(history, history.index(PROBE))):
            self.ends.add(found.group())
        call = {"type": "function", "function": {"name": PROBE, "arguments": {"a": "b"}}}
        called = self._try([ask, {**_said("assistant", ""), "tool_calls": [call]}]) or ""
        if PROBE in called:
            at = called.index(PROBE)
            self.leads.append(called[called.rfind(self.head, 0, at) + len(self.head) : at])
            found_ends = [m.group() for m in self.marks.finditer(called, at)]
            if found_ends and not self.ends & {*found_ends}:
                self.ends.add(found_ends[-1])

    def _look_at_thoughts(self, ask: dict[str, Any]) -> None:
        inside = f"<think>\n{THOUGHT}\n</think>\n\n{PROBE}"
        beside = self._try([ask, {**_said("assistant", PROBE), "reasoning_content": THOUGHT}]) or ""
        inline = self._try([ask, _said("assistant", inside)]) or ""
        self.reasoning = "native" if THOUGHT in beside else "inline" if THOUGHT in inline else "insert"
        """How a template shows reasoning: beside the content, inside of it, or not at all."""
        self.parses = beside == inline
        if self.reasoning == "native":
            head = beside.rfind(self.head, 0, beside.index(THOUGHT))
            self.leads.append(beside[head + len(self.head) : beside.rindex(PROBE)])

    def _try(self, chat: list[dict[str, Any]], **options: Any) -> str | None:
        try:
            return self.render(chat, **options)
        except Skip:
            return None

    def _shown(self, chat: list[dict[str, Any]]) -> str | None:
        text = self._try(chat)
        return text if text and all(turn["content"] in text for turn in chat) else None


ADVICE = f"give another one with --template FILE, or {', '.join(NAMED)}"


def same_start(one: str, other: str) -> int:
    """So many characters are the same at the beginning of both."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _shown(text: str) -> str:
    """A stranger's text on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)[:SAID]
