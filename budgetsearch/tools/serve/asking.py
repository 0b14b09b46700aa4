"""What routes have in common: the model that is served, and waiting for its answers on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from starlette.requests import Request

from budgetsearch.core.errors import UsageError
from budgetsearch.training.data.apart import EncoderApart
from budgetsearch.training.data.conversation import Skip
from budgetsearch.training.data.shapes import sample_of
from budgetsearch.training.inference.engine import Engine
from budgetsearch.training.inference.sequence import Answer, Sampling
from budgetsearch.training.inference.text import Pieces


class TooLong(UsageError):
    """A request that the model's context does not hold."""


class Gone(Exception):
    """The client hung up; nobody reads an answer."""


class Failed(Exception):
    """The model could not answer."""


@dataclass(frozen=True)
class Served:
    """A model that answers, by its name."""

    name: str
    engine: Engine
    encoder: EncoderApart
    context: int
    """Tokens of prompt and answer together."""

    @cached_property
    def pieces(self) -> Pieces:
        """What its tokens say."""
        return Pieces(self.encoder.tokenizer)

    def ids(self, text: str) -> list[int]:
        """A text as it is, with what the tokenizer itself puts in front.

        Raises:
            UsageError: it takes too much time or memory.
        """
        return self.encoder.ids(text)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
        """A conversation as training saw what comes before an answer.

        Raises:
            UsageError: the model's chat template does not take it, or takes too much time or memory for it.
        """
        if not messages or messages[-1].get("role") not in ("user", "tool", "system", "developer"):
            raise UsageError("messages: the last one must be what is to be answered, of a user or a tool.")
        row = {"messages": [*messages, {"role": "assistant", "content": "x"}], "tools": list(tools) or None}
        try:
            return self.encoder.prompt(sample_of(row)[0])
        except Skip as skip:
            raise UsageError(f"messages: {skip.reason}.") from None

    def check(self, prompt: Sequence[int], new: int) -> None:
        """Insist on a prompt that fits.

        Raises:
            UsageError: it is empty, or names tokens that there are not.
            TooLong: prompt and answer are longer than the context.
        """
        if not prompt:
            raise UsageError("The prompt is empty: there is no token to go on from.")
        rows = len(self.encoder.tokenizer)
        if wrong := [token for token in prompt if not 0 <= token < rows]:
            raise UsageError(f"The prompt holds token {wrong[0]}; there are {rows}.")
        if len(prompt) + new > self.context:
            raise TooLong(
                f"The model holds {self.context} tokens, and this asks for {len(prompt) + new}: {len(prompt)}"
                f" of the prompt and {new} of the answer. Shorten one of them."
            )

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling, copies: int = 1) -> Exchange:
        """Take requests on: ``copies`` answers to each prompt.

        Raises:
            UsageError: a prompt does not fit.
            Busy, Closing: they cannot be taken now.
        """
        for prompt in prompts:
            self.check(prompt, sampling.max_tokens)
        exchange = Exchange()
        exchange.answers = [
            Answer(
                prompt, sampling, self.pieces, self.encoder.reader.stops, number=number, tell=exchange.tell
            )
            for prompt in prompts
            for number in range(copies)
        ]
        self.engine.submit(exchange.answers)
        return exchange


class Exchange:
    """The answers of one request, heard on the event loop."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[tuple[Answer, int, int, str]] = asyncio.Queue()

    def tell(self, answer: Answer) -> None:
        """From the engine's thread: what is sure of the answer now."""
        said = (answer, answer.writer.shown, len(answer.tokens), answer.finish)
        with suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self._heard.put_nowait, said)

    async def parts(self) -> AsyncIterator[tuple[Answer, int, int, str]]:
        """(answer, characters that stay, tokens so far, finish) as they come, until all are over; whoever
        stops listening cancels them.

        Raises:
            Failed: the model could not answer.
        """
        left = len(self.answers)
        try:
            while left:
                part = await self._heard.get()
                if part[3] == "error":
                    raise Failed(part[0].failure)
                left -= bool(part[3])
                yield part
        finally:
            self.cancel()

    async def whole(self, request: Request) -> Sequence[Answer]:
        """All answers, once they are over.

        Raises:
            Gone: the client hung up.
            Failed: the model could not answer.
        """
        done = asyncio.create_task(self._all())
        gone = asyncio.create_task(_hung_up(request))
        try:
            await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise Gone
            await done
        finally:
            gone.cancel()
            done.cancel()
            self.cancel()
        return self.answers

    def cancel(self) -> None:
        """Nobody wants what is not there yet."""
        for answer in self.answers:
            answer.cancelled = True

    async def _all(self) -> None:
        async for _ in self.parts():
            pass


async def _hung_up(request: Request) -> None:
    """Returns when the client has; the body has been read, so nothing else is to come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
