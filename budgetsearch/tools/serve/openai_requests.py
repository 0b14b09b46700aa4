"""What is asked in OpenAI's API: the fields that mean something here; any other is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from budgetsearch.training.inference.sequence import Sampling

Penalty = Annotated[float, Field(ge=-2, le=2)]
Stops = str | list[str] | None


class StreamOptions(BaseModel):
    """Of a stream."""

    include_usage: bool = False


class Asked(BaseModel):
    """What both routes take."""

    model_config = ConfigDict(extra="forbid")
    model: str
    n: int = Field(1, ge=1, le=64)
    temperature: float = Field(1.0, ge=0)
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = Field(0, ge=0)
    stop: Stops = None
    seed: int | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    def sampling(self, max_tokens: int, candidates: int, *, echo: bool = False) -> Sampling:
        """How its tokens are drawn."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(stops),
            seed=self.seed,
            candidates=candidates,
            echo=echo,
            presence=self.presence_penalty,
            frequency=self.frequency_penalty,
        )

    @property
    def wants_usage(self) -> bool:
        """Whether the last part of a stream counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionAsked(Asked):
    """A text, tokens, or several of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=100)
    echo: bool = False
    best_of: int | None = None


class ChatAsked(Asked):
    """A conversation."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "none"] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
