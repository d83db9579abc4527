"""What one record of training data is: text, a prompt with its completion, or a conversation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Text:
    """Running text; every token is trained on."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and what should follow it; only the completion is trained on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `role` is one of `ROLES`."""

    role: str
    content: str
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further fields that the chat template is given: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`."""
    trained: bool = True
    """Whether the loss counts this turn, if it is the assistant's."""

    @property
    def is_trained(self) -> bool:
        """Whether the loss counts this turn."""
        return self.trained and self.role == "assistant"

    def fields(self) -> dict[str, Any]:
        """The message as a chat template expects it."""
        return {"role": self.role, "content": self.content, **self.details}


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the tools that the assistant may call, as JSON schemas.

    Only turns of the assistant's are trained on, and at least one is.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


Record = Text | Completion | Conversation


def split_turns(conversation: Conversation) -> Iterator[Conversation]:
    """One conversation for each turn that is trained on: it ends with that turn, and trains on no other."""
    for index, message in enumerate(conversation.messages):
        if message.is_trained:
            before = tuple(replace(earlier, trained=False) for earlier in conversation.messages[:index])
            yield replace(conversation, messages=(*before, message))
