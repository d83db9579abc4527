"""Bodies of OpenAI's requests for text, strictly parsed: an unknown field is refused, as OpenAI refuses it.

Fields that OpenAI knows and this service does not follow are taken with the value that changes nothing, and refused
with any other.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_STOPS = 4
MOST_PROMPTS = 64
MOST_MESSAGES = 2048
MOST_CHARACTERS = 4 * 2**20
MAX_SEED = 2**63 - 1
Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class Strict(BaseModel):
    """A body, or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Taken and not followed: answers go through TLS alone."""


class _Generation(Strict):
    """What completions and chats have in common."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=4)] | None = (
        None
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        Field(default=None, max_length=1024)
    )
    seed: Annotated[int, Field(ge=-(2**63), le=MAX_SEED)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    @field_validator("model", mode="after")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("a model's name is printable")
        return value

    @model_validator(mode="after")
    def _streamed(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true alone")
        if isinstance(self.stop, str) and len(self.stop) > 1024:
            raise ValueError("a stop sequence has at most 1024 characters")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop sequences."""
        if self.stop is None or self.stop == "":
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def biases(self) -> dict[int, float]:
        """Biases by token id."""
        return {int(token): float(bias) for token, bias in (self.logit_bias or {}).items()}

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(_Generation):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _best(self) -> "CompletionBody":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is followed where it equals n alone")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several prompts."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class _TextFormat(Strict):
    type: Literal["text"]


class ChatBody(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: _TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    """Nothing of a conversation is kept."""
    metadata: Metadata | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs=true alone")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one setting: leave one out")
        return self
