"""A Modelfile for Ollama: the chat template in Go's language, found out from what the Jinja one writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from budgetsearch.core.errors import ModelError
from budgetsearch.tools.export.ggml_tokenizer import begins
from budgetsearch.training.data.conversation import Skip

if TYPE_CHECKING:
    from budgetsearch.training.data.apart import EncoderApart
    from budgetsearch.training.data.templates import Template

    Renders = EncoderApart | Template

Chat = Sequence[Mapping[str, Any]]
ROLES = ("system", "user", "assistant")
WORDS = {role: f"budgetsearch{role}says" for role in ROLES}
"""Stand for what a turn says."""
CHATS: Sequence[Sequence[str]] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
"""What the two templates must write alike."""


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around what is said."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    nobody: str
    """In front of a conversation that has no system text."""
    answer: str
    """Before what the model is to write."""

    def written(self, roles: Sequence[str]) -> str:
        """What the template of ``go`` writes of turns with these roles, before an answer."""
        text = "" if roles[0] == "system" else self.nobody
        for role in roles:
            before, behind = getattr(self, role)
            text += f"{before}{WORDS[role]}{behind}"
        return text + self.answer

    def go(self) -> str:
        """The same as a template of Go, all literals quoted: nothing is trimmed."""
        turns = "".join(
            f'{{{{ {word} eq .Role "{role}" }}}}{self._turn(role)}'
            for word, role in (("if", "user"), ("else if", "assistant"))
        )
        system = f"{{{{ if .System }}}}{self._turn('system', '.System')}{{{{ else }}}}{_quoted(self.nobody)}"
        end = "{{ end }}"
        return f"{system}{end}{{{{ range .Messages }}}}{turns}{end}{end}{_quoted(self.answer)}"

    def _turn(self, role: str, said: str = ".Content") -> str:
        before, behind = getattr(self, role)
        return f"{_quoted(before)}{{{{ {said} }}}}{_quoted(behind)}"


def modelfile(template: Renders, stops: Sequence[str], file: str) -> str:
    """The Modelfile beside a GGUF file.

    Raises:
        ModelError: the chat template does more than to stand around what is said.
    """
    pieces = pieces_of(template)
    lines = [f"FROM ./{file}", f'TEMPLATE """{pieces.go()}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def pieces_of(template: Renders) -> Pieces:
    """Take a chat template apart, and insist that the parts write what it writes.

    Raises:
        ModelError: they do not.
    """
    try:
        pieces = _apart(template)
        alike = all(pieces.written(roles) == _text(template, roles) for roles in CHATS)
    except (Skip, ValueError) as error:
        raise ModelError(f"The chat template cannot be written as Ollama's ({error}). {ADVICE}") from error
    if not alike or '"""' in pieces.go():
        raise ModelError(f"The chat template does more than Ollama's can say. {ADVICE}")
    return pieces


ADVICE = "Export --gguf without --ollama: the file carries the template, and llama.cpp runs most of them."


def _apart(template: Renders) -> Pieces:
    """From three conversations; what follows a turn belongs to it up to where the next one begins."""
    alone = _text(template, ("user",), asked=False)
    more = _text(template, ("user", "assistant", "user"), asked=False)
    led = _text(template, ("system", "user"), asked=False)
    head, rest = alone.split(WORDS["user"])
    _, between, _ = more.split(WORDS["user"])
    to_answer, from_answer = between.split(WORDS["assistant"])
    before_system, rest_led = led.split(WORDS["system"])
    to_user, _ = rest_led.split(WORDS["user"])
    user = _common_end(head, to_user)
    behind_user = rest
    asked = _text(template, ("user",))
    return Pieces(
        system=(before_system, to_user.removesuffix(user)),
        user=(user, behind_user),
        assistant=(to_answer.removeprefix(behind_user), from_answer.removesuffix(user)),
        nobody=head.removesuffix(user),
        answer=asked.removeprefix(alone),
    )


def _common_end(one: str, other: str) -> str:
    """What both end in, from a mark of the template on where there is one: what opens the user's turn."""
    length = next(
        (i for i, (a, b) in enumerate(zip(reversed(one), reversed(other), strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return one[len(one) - length :]


def _text(template: Renders, roles: Sequence[str], *, asked: bool = True) -> str:
    """What the template writes, without a beginning that the tokenizer puts there itself."""
    chat = [{"role": role, "content": WORDS[role]} for role in roles]
    text = template.render(chat, prompt=asked)
    bos = template.tokenizer.bos_token
    return text.removeprefix(bos) if bos and begins(template.tokenizer) else text


def _quoted(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
