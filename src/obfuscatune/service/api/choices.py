"""One request's answer while it comes: its choices, its account, and how it ends."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from obfuscatune.service.api.context import Context, Target
from obfuscatune.service.api.requests import ChatBody, CompletionBody
from obfuscatune.service.keys import Owner
from obfuscatune.service.requests import FinishEvent, Handle, PromptEvent, TokenEvent


@dataclass
class Choice:
    """One answer while it comes."""

    index: int
    handle: Handle
    prompt: Sequence[int]
    text: list[str] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    prompt_logprobs: PromptEvent | None = None
    finish: FinishEvent | None = None


@dataclass
class Answer:
    """All choices of one request."""

    context: Context
    owner: Owner
    target: Target
    body: CompletionBody | ChatBody
    prompts: list[list[int]]
    choices: list[Choice]
    id: str
    created: int
    resources: ExitStack
    used: list[int]

    @property
    def is_chat(self) -> bool:
        """Whether it is answered in the form of a chat."""
        return isinstance(self.body, ChatBody)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, as OpenAI counts them: a prompt once, however many choices it has."""
        prompt = sum(len(ids) for ids in self.prompts)
        completion = sum(it.finish.completion_tokens for it in self.choices if it.finish is not None)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that each object of the answer has."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.target.name,
            "system_fingerprint": f"fp_{self.target.model.digest[:12]}",
        }

    def end(self) -> None:
        """Cancel what still runs, and settle the account. Blocks."""
        for choice in self.choices:
            if choice.finish is None:
                choice.handle.cancel()
        done = sum((len(it.tokens) if it.finish is None else it.finish.completion_tokens) for it in self.choices)
        read = sum(len(ids) for ids in self.prompts)
        self.used.append(read + done)
        self.context.metrics.tokens.labels("prompt").inc(read)
        self.context.metrics.tokens.labels("completion").inc(done)
        self.resources.close()
        self.context.log.append(
            self.owner.spki,
            "chat" if self.is_chat else "completion",
            {"model": self.target.grant.model, "grant": self.target.grant.id, "prompt": read, "completion": done},
        )


def take(choice: Choice, event: Any) -> None:
    """Add an event of the engine's to its choice."""
    match event:
        case PromptEvent():
            choice.prompt_logprobs = event
        case TokenEvent():
            choice.tokens.append(event)
            choice.text.append(event.text)
        case FinishEvent():
            choice.text.append(event.text)
            choice.finish = event
