"""OpenAI's API: completions and chat completions, whole or as a stream, and the list of models."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from budgetsearch.core.errors import UsageError
from budgetsearch.tools.serve.asking import Exchange, Failed, Served
from budgetsearch.tools.serve.openai_requests import Asked, ChatAsked, CompletionAsked
from budgetsearch.training.inference.sequence import Answer, Token

Choice = Callable[[Answer, int, int, int], dict[str, Any]]
"""(answer, its place, characters from, tokens from) to a choice that tells of what comes after these."""


def routes(served: Served) -> APIRouter:
    """Its three routes."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> Mapping[str, Any]:
        about = {"id": served.name, "object": "model", "created": 0, "owned_by": "budgetsearch"}
        return {"object": "list", "data": [{**about, "max_model_len": served.context}]}

    @router.post("/completions")
    async def completions(asked: CompletionAsked, request: Request) -> Response:
        _check_model(served, asked)
        if asked.best_of not in (None, asked.n):
            raise UsageError("best_of: only as many as n are drawn.")
        prompts = await run_in_threadpool(_prompts, served, asked.prompt)
        new = 16 if asked.max_tokens is None else asked.max_tokens
        told = asked.echo and asked.logprobs is not None
        how = asked.sampling(new, asked.logprobs or 0, echo=told or new == 0)
        exchange = served.begin(prompts, how, asked.n)
        choice = _Completion(served, asked)
        return await _respond(served, asked, exchange, choice, request)

    @router.post("/chat/completions")
    async def chat(asked: ChatAsked, request: Request) -> Response:
        _check_model(served, asked)
        tools = asked.tools if asked.tool_choice != "none" else []
        prompt = await run_in_threadpool(served.chat_ids, asked.messages, tools)
        served.check(prompt, 1)
        new = asked.max_completion_tokens or asked.max_tokens or served.context - len(prompt)
        exchange = served.begin([prompt], asked.sampling(new, asked.top_logprobs), asked.n)
        choice = _Chat(served, asked)
        return await _respond(served, asked, exchange, choice, request)

    return router


def _check_model(served: Served, asked: Asked) -> None:
    if asked.model != served.name:
        raise HTTPException(404, f"There is no model {asked.model!r} here; it is called {served.name!r}.")


def _prompts(served: Served, prompt: Any) -> list[list[int]]:
    if isinstance(prompt, str):
        return [served.ids(prompt)]
    if prompt and isinstance(prompt[0], int):
        return [list(prompt)]
    return [served.ids(one) if isinstance(one, str) else list(one) for one in prompt]


# ------------------------------------------------------------------------------- choices


class _Completion:
    """Choices of ``/v1/completions``."""

    kind, part = "text_completion", "text_completion"

    def __init__(self, served: Served, asked: CompletionAsked) -> None:
        self._served, self._asked = served, asked

    def opening(self, place: int) -> Mapping[str, Any] | None:
        """What a stream begins with, beside text."""
        return None

    def whole(self, answer: Answer, place: int) -> dict[str, Any]:
        """All of an answer."""
        return self.since(answer, place, (0, len(answer.writer.text)), (0, len(answer.tokens)))

    def since(
        self, answer: Answer, place: int, text: tuple[int, int], tokens: tuple[int, int]
    ) -> dict[str, Any]:
        """What came between two moments, in characters and in tokens."""
        said, new = answer.writer.text[slice(*text)], answer.tokens[slice(*tokens)]
        before: list[Token] = []
        offset = 0
        if self._asked.echo:
            echoed = self._served.pieces.text(answer.prompt)
            if text[0] == 0 and tokens[0] == 0:
                said = echoed + said
                before = answer.prompt_tokens or []
            offset = len(echoed)
        told = None
        if self._asked.logprobs is not None:
            told = self._logprobs(before, new, offset)
        return {"index": place, "text": said, "logprobs": told, "finish_reason": None}

    def _logprobs(self, before: Sequence[Token], new: Sequence[Token], offset: int) -> dict[str, Any]:
        pieces = self._served.pieces
        places, at = [], 0
        for token in before:
            places.append(at)
            at += len(pieces.piece(token.id))
        every = [*before, *new]
        return {
            "tokens": [pieces.piece(token.id) for token in every],
            "token_logprobs": [token.logprob for token in every],
            "top_logprobs": [self._likeliest(token) for token in every],
            "text_offset": [*places, *(offset + token.start for token in new)],
        }

    def _likeliest(self, token: Token) -> dict[str, float] | None:
        """By what they say; of two that say the same the likelier one."""
        if token.logprob is None:
            return None
        pairs = [(token.id, token.logprob), *reversed(token.candidates)]
        return {self._served.pieces.piece(one): logprob for one, logprob in pairs}


class _Chat:
    """Choices of ``/v1/chat/completions``."""

    kind, part = "chat.completion", "chat.completion.chunk"

    def __init__(self, served: Served, asked: ChatAsked) -> None:
        self._served, self._asked = served, asked

    def opening(self, place: int) -> Mapping[str, Any] | None:
        """A stream begins with whose turn it is."""
        return {"index": place, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def whole(self, answer: Answer, place: int) -> dict[str, Any]:
        """All of an answer."""
        message = {"role": "assistant", "content": answer.writer.text}
        told = self._logprobs(answer.tokens)
        return {"index": place, "message": message, "logprobs": told, "finish_reason": None}

    def since(
        self, answer: Answer, place: int, text: tuple[int, int], tokens: tuple[int, int]
    ) -> dict[str, Any]:
        """What came between two moments, in characters and in tokens."""
        delta = {"content": answer.writer.text[slice(*text)]}
        told = self._logprobs(answer.tokens[slice(*tokens)])
        return {"index": place, "delta": delta, "logprobs": told, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        told = [
            {
                **self._said(token.id, token.logprob or 0.0),
                "top_logprobs": [self._said(*pair) for pair in token.candidates],
            }
            for token in tokens
        ]
        return {"content": told}

    def _said(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._served.pieces.piece(token)
        return {"token": piece, "logprob": logprob, "bytes": list(piece.encode("utf-8"))}


# ----------------------------------------------------------------------------- responses


async def _respond(
    served: Served, asked: Asked, exchange: Exchange, choice: _Completion | _Chat, request: Request
) -> Response:
    about = {"id": f"{choice.kind[:4]}-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
    if asked.stream:
        stream = _stream(asked, exchange, choice, {**about, "object": choice.part})
        return StreamingResponse(stream, media_type="text/event-stream")
    answers = await exchange.whole(request)
    choices = [
        {**choice.whole(answer, place), "finish_reason": answer.finish}
        for place, answer in enumerate(answers)
    ]
    whole = {**about, "object": choice.kind, "choices": choices, "usage": _usage(answers, asked.n)}
    return JSONResponse(whole)


async def _stream(
    asked: Asked, exchange: Exchange, choice: _Completion | _Chat, about: Mapping[str, Any]
) -> AsyncIterator[str]:
    """Server-sent events: a part for each piece of text that is sure to stay."""
    places = {id(answer): place for place, answer in enumerate(exchange.answers)}
    sent = dict.fromkeys(places.values(), (0, 0))
    for place in sent:
        if (opening := choice.opening(place)) is not None:
            yield _event({**about, "choices": [opening]})
    try:
        async for answer, shown, count, finish in exchange.parts():
            place = places[id(answer)]
            text, tokens = sent[place]
            # Of tokens whose text may still become a stop sequence nothing is told either.
            sure = count if finish else sum(token.start < shown for token in answer.tokens[:count])
            if shown > text or sure > tokens or finish:
                part = choice.since(answer, place, (text, shown), (tokens, sure))
                yield _event({**about, "choices": [{**part, "finish_reason": finish or None}]})
                sent[place] = (max(text, shown), max(tokens, sure))
    except Failed as error:
        yield _event({"error": {"message": str(error), "type": "server_error", "code": 500}})
        return
    if asked.wants_usage:
        yield _event({**about, "choices": [], "usage": _usage(exchange.answers, asked.n)})
    yield "data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _usage(answers: Sequence[Answer], copies: int) -> dict[str, int]:
    """A prompt counts once, however many answers it has."""
    prompt = sum(len(answer.prompt) for answer in answers[::copies])
    new = sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
