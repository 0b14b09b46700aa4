"""The API that the NeurIPS LLM Efficiency Challenge asked its entries for, as its harness calls it."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from budgetsearch.tools.serve.asking import Served
from budgetsearch.training.inference.sequence import Answer, Sampling, Token

Share = Annotated[float, Field(gt=0, le=1)]


class Process(BaseModel):
    """A prompt. ``num_samples`` and its other name: so many are drawn, and the likeliest one is told.
    ``top_k_per_token``: candidates that are told of at each place."""

    prompt: str
    num_samples: int = Field(1, ge=1, le=64)
    num_return_sequences: int | None = Field(None, ge=1, le=64)
    max_new_tokens: int = Field(50, ge=0)
    top_k: int = Field(200, ge=0)
    top_p: Share = 1.0
    temperature: float = Field(0.8, ge=0)
    seed: int | None = None
    echo_prompt: bool | None = None
    top_k_per_token: int = Field(1, ge=0, le=100)
    stop_sequences: list[str] | None = None


class Said(BaseModel):
    """A token."""

    text: str
    logprob: float
    top_logprob: dict[str, float]


class Processed(BaseModel):
    """The answer, behind its prompt if that was to be echoed."""

    text: str
    tokens: list[Said]
    logprob: float
    request_time: float


class Tokenize(BaseModel):
    """A text."""

    text: str
    truncation: bool = True
    max_length: int = Field(2048, ge=1)


class Tokenized(BaseModel):
    """Its tokens."""

    tokens: list[int]
    request_time: float


class Decode(BaseModel):
    """Tokens."""

    tokens: list[int]


class Decoded(BaseModel):
    """Their text."""

    text: str
    request_time: float


def routes(served: Served) -> APIRouter:
    """Its three routes."""
    router = APIRouter()

    @router.post("/process")
    async def process(asked: Process, request: Request) -> Processed:
        start, echo = time.perf_counter(), bool(asked.echo_prompt)
        prompt = await run_in_threadpool(served.ids, asked.prompt)
        exchange = served.begin([prompt], sampling_of(asked), copies_of(asked))
        best = max(await exchange.whole(request), key=logprob_of)
        tokens = [*((best.prompt_tokens or []) if echo else []), *best.tokens]
        return Processed(
            text=(asked.prompt if echo else "") + best.writer.text,
            tokens=[said(served, token) for token in tokens],
            logprob=sum(token.logprob or 0.0 for token in tokens),
            request_time=time.perf_counter() - start,
        )

    @router.post("/tokenize")
    async def tokenize(asked: Tokenize) -> Tokenized:
        start = time.perf_counter()
        ids = await run_in_threadpool(served.ids, asked.text)
        kept = ids[: asked.max_length] if asked.truncation else ids
        return Tokenized(tokens=kept, request_time=time.perf_counter() - start)

    @router.post("/decode")
    async def decode(asked: Decode) -> Decoded:
        start = time.perf_counter()
        return Decoded(text=served.pieces.text(asked.tokens), request_time=time.perf_counter() - start)

    return router


def sampling_of(asked: Process) -> Sampling:
    """How its tokens are drawn."""
    return Sampling(
        max_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        stop=tuple(asked.stop_sequences or ()),
        seed=asked.seed,
        candidates=asked.top_k_per_token,
        echo=bool(asked.echo_prompt) or asked.max_new_tokens == 0,
    )


def copies_of(asked: Process) -> int:
    """Answers to draw; at temperature 0 they are all the same."""
    return 1 if asked.temperature == 0 else asked.num_return_sequences or asked.num_samples


def logprob_of(answer: Answer) -> float:
    """Of the answer alone."""
    return sum(token.logprob or 0.0 for token in answer.tokens)


def said(served: Served, token: Token) -> Said:
    """A token as the harness reads it; the first of a prompt has no probability and counts nothing."""
    return Said(
        text=served.pieces.piece(token.id),
        logprob=token.logprob or 0.0,
        top_logprob={served.pieces.piece(one): logprob for one, logprob in reversed(token.candidates)},
    )
