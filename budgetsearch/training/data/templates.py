"""The model's chat template as a program of a stranger's: what it takes, what it writes around an answer.

All of it is found by rendering probes once; a row is then given to the template in the form that it takes.
"""

from __future__ import annotations

import copy
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
from budgetsearch.training.data.messages import shown
from budgetsearch.training.data.probes import ASK, PROBE, Known, probe, said
from budgetsearch.training.data.reader import marks_of

DAY = datetime.datetime(2024, 7, 26)
"""Today, for every template that asks: rows must not depend on the day of the run."""
VALUES: Mapping[str, Any] = {"date_string": f"{DAY:%d %b %Y}"}
X = "\U0010fffdbudgetsearch\U0010fffd"
"""Stands for an answer; begins and ends with what no text begins or ends with, and no template trims."""
SHORT = re.compile(r"[A-Za-z0-9]{9}")
FOLDED = "the chat template has no system role: the system text stands in front of the first user turn"
SHORTENED = "the chat template wants ids of nine letters and digits: calls have new ones"
SAID = 160
"""Characters of a template's own complaint."""

OWN = """\
{{- BOS }}
{%- if tools %}{{- '### Functions\\n' + (tools | map('tojson') | join('\\n')) + '\\n\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '### Response\\n' }}
        {%- generation %}CALLS{{- EOS }}{%- endgeneration %}{{- '\\n\\n' }}
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
        {%- generation %}CALLS{{- EOS }}{%- endgeneration %}{{- '\\n' }}
    {%- else %}{{- message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
CALLS = """\
{{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- ('\\n' if message.content or not loop.first else '') + '<tool_call>' }}
            {{- (call.function | tojson) + '</tool_call>' }}
        {%- endfor %}"""
"""The text of an answer, and its calls."""
NAMED = {"none": OWN.replace("CALLS", CALLS), "chatml": CHATML.replace("CALLS", CALLS)}


@dataclass(frozen=True)
class Options:
    """How rows become tokens, beside the model's own files."""

    template: str | None = None
    """None: the model's own. Else a name of ``NAMED``, a template's text, or the path of its file."""
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
            self.tokenizer = copy.copy(self.tokenizer)
            self.tokenizer.chat_template = self._chosen()
        self.source = self.tokenizer.chat_template
        self.marks = marks_of(self.tokenizer)
        self.parts = False
        self.known = self._look()
        self.borders = {*self.marks.findall(self.known.head), *filter(self.marks.fullmatch, self.known.ends)}

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
            chat = [{**turn, "content": [{"type": "text", "text": turn["content"] or ""}]} for turn in chat]

        try:
            source = self.tokenizer.get_chat_template(None, tools or None)
            compiled = chat_template_utils._compile_jinja_template(source)
            compiled.environment.globals["strftime_now"] = DAY.strftime
            texts, found = chat_template_utils.render_jinja_template(
                conversations=[list(chat)], tools=list(tools) or None, chat_template=source,
                return_assistant_tokens_mask=marked, add_generation_prompt=prompt, **values,
            )  # fmt: skip
        except Exception as error:  # a template is a stranger's program: it may divide by zero or call itself
            words = " ".join(str(error).split()) or type(error).__name__
            raise Skip(f"the chat template does not take it: {shown(words, SAID)}") from None
        return texts[0], found[0] if found else []

    def chat(self, talk: Conversation) -> list[dict[str, Any]]:
        """The turns as the template takes them.

        Raises:
            Skip: there is no user turn to put the system text into.
        """
        turns = list(talk.turns)
        if self.options.system and not any(t.role in ("system", "developer") for t in turns):
            turns.insert(0, Turn("system", self.options.system))
        if not self.known.system and turns[0].role in ("system", "developer"):
            turns = self._folded(turns)
        messages = [self._message(turn) for turn in turns]
        if not self.known.calls_need_ids:
            return messages
        if self.known.ids_are_short and _shorten(messages):
            self.notes[SHORTENED] += 1
        return _numbered(messages)

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
            rest = "messages"
            if not self.known.system:
                text = f"{json.dumps(self.options.system)} + '\\n\\n' + messages[0].content"
                turn, rest = f"{{'role': 'user', 'content': {text}}}", "messages[1:]"
            before += f"{{%- if messages[0].role != 'system' %}}{{%- set messages = [{turn}] + {rest} %}}"
            before += "{%- endif %}\n"
        if not before and not self.own and not self.options.template:
            return ""
        source = self.tokenizer.get_chat_template()
        return f"{before}{source}"

    def asking(self) -> Any:
        """A tokenizer whose own chat template asks as training asked."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = self.used() or tokenizer.chat_template
        return tokenizer

    def _folded(self, turns: list[Turn]) -> list[Turn]:
        if len(turns) < 2 or turns[1].role != "user":
            raise Skip("the chat template has no system role, and no user turn follows the system text")
        self.notes[FOLDED] += 1
        content = f"{turns[0].content}\n\n{turns[1].content}"
        return [Turn("user", content, about=turns[1].about), *turns[2:]]

    def _message(self, turn: Turn) -> dict[str, Any]:
        role = "system" if turn.role == "developer" and "developer" not in str(self.source) else turn.role
        content, thought = self._thought(turn)
        message: dict[str, Any] = {"role": role, "content": content, **turn.about}
        if thought:
            message["reasoning_content"] = thought
        if turn.tool_calls:
            message["tool_calls"] = [self._call(call) for call in turn.tool_calls]
            message["content"] = content or self.known.empty
        return message

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        if self.known.calls_as_text:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": function}

    def _thought(self, turn: Turn) -> tuple[str, str]:
        """The content as the template takes it, and the reasoning that it takes beside it."""
        thought, bare = split_thought(turn)
        mode = "off" if self.options.thinking == "off" else self.known.reasoning
        if mode == "off" and thought:
            self.notes["reasoning is left out (--thinking off)"] += 1
        if mode in ("off", "insert"):
            return bare, ""
        if mode == "inline":
            return f"<think>\n{thought}\n</think>\n\n{bare}" if turn.reasoning else turn.content, ""
        return (bare, thought) if turn.reasoning or not self.known.parses else (turn.content, "")

    # --------------------------------------------------------------------------- probing

    def _chosen(self) -> str:
        name = written(self.options.template or "none")
        if name not in NAMED:
            return name
        begins = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        end = self.tokenizer.eos_token or ""
        if name == "chatml" and "<|im_end|>" in self.tokenizer.get_vocab():
            end = "<|im_end|>"
        source = NAMED[name].replace("BOS", json.dumps(self.tokenizer.bos_token if begins else ""))
        return source.replace("EOS", json.dumps(end))

    def _look(self) -> Known:
        chat = [said("user", ASK), said("assistant", PROBE)]
        whole = self._shown(chat)
        if whole is None:
            self.parts = True  # content as a list of parts, as models with pictures have it
            whole = self._shown(chat)
        if whole is None:
            self.parts = False
            try:
                self.render(chat)
                reason = "it does not show them"
            except Skip as skip:
                reason = skip.reason
            raise DataError(f"The chat template cannot write a question and its answer ({reason}); {ADVICE}")
        return probe(self._try, lambda chat: self._try(chat, prompt=True), self.marks, whole)

    def _try(self, chat: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self.render(chat, **options)
        except Skip:
            return ""

    def _shown(self, chat: list[dict[str, Any]]) -> str | None:
        text = self._try(chat)
        return text if all(turn["content"] in text for turn in chat) else None


ADVICE = f"give another one with --template FILE, or {', '.join(NAMED)}"


def _shorten(messages: list[dict[str, Any]]) -> bool:
    """Give calls and their results other ids where theirs have another length; says whether any had."""
    calls = [call for message in messages for call in message.get("tool_calls", ()) if call.get("id")]
    results = [message for message in messages if message.get("tool_call_id")]
    there = [call["id"] for call in calls] + [result["tool_call_id"] for result in results]
    new = {one: f"call{number:05d}" for number, one in enumerate(dict.fromkeys(there))}
    if all(SHORT.fullmatch(one) for one in there):
        return False
    for call in calls:
        call["id"] = new[call["id"]]
    for result in results:
        result["tool_call_id"] = new[result["tool_call_id"]]
    return True


def _numbered(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With an id for each call that has none, and with that of its call for each result."""
    open_calls: list[str] = []
    for number, message in enumerate(messages):
        for place, call in enumerate(message.get("tool_calls", ())):
            call["id"] = call.get("id") or f"call{number:03d}{place:02d}"
            open_calls.append(call["id"])
        if message["role"] == "tool" and open_calls:
            known = message.setdefault("tool_call_id", open_calls[0])
            open_calls = [one for one in open_calls if one != known]
    return messages


def written(template: str) -> str:
    """What ``--template`` means: one of the names, or a template's text, from its file if need be.

    Raises:
        DataError: it is neither, and no file that can be read.
    """
    if template in NAMED or "{{" in template or "{%" in template:
        return template
    try:
        text = Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        known = ", ".join(NAMED)
        raise DataError(
            f"--template {shown(template, SAID)}: give {known} or a Jinja file that can be read ({error})"
        ) from None
    if "{{" not in text and "{%" not in text:
        raise DataError(f"--template {shown(template, SAID)}: no Jinja template is in it; name another")
    return text
