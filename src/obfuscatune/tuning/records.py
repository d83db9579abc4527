"""What a line of training data may be: text, a prompt with its completion, or a conversation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from obfuscatune.tuning.jsonl import Line, field_faults, json_type, text_of
from obfuscatune.tuning.tasks import Task
from obfuscatune.wire.errors import DataError

ROLES = ("system", "user", "assistant")


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


@dataclass(frozen=True)
class Conversation:
    """Turns in order; only the assistant's are trained on. At least one is the assistant's."""

    messages: tuple[Message, ...]


Record = Text | Completion | Conversation


def parse_record(line: Line) -> Record:
    """Read one of the three layouts. Its fields say which it is, and no others may stand beside them.

    Raises:
        DataError: missing or unknown fields, a wrong type, an empty text or completion, an unknown role,
            no turn of the assistant's.
    """
    keys = line.fields.keys()
    for fields, parse in _LAYOUTS.items():
        if keys == set(fields):
            return parse(line)
    for fields in _LAYOUTS:
        if keys & set(fields):
            faults = field_faults(line, set(fields))
            raise DataError(f"{line.where}: expected the fields {' and '.join(fields)} alone; {faults}")
    found = ", ".join(sorted(keys)) or "none"
    raise DataError(f"{line.where}: expected text, or prompt and completion, or messages; found the fields: {found}")


def parse_task_record(task: Task, line: Line) -> Completion:
    """Read one of a task's own records as its evaluation prompt and the gold answer.

    Raises:
        DataError: as the task's own reader says.
    """
    question = task.read(line)
    return Completion(question.prompt, " " + question.choices[question.gold[0]])


def _text(line: Line) -> Text:
    return Text(text_of(line, "text", line.fields["text"]))


def _completion(line: Line) -> Completion:
    prompt = line.fields["prompt"]
    if prompt != "":  # an empty prompt is one: the model starts from nothing
        prompt = text_of(line, "prompt", prompt)
    return Completion(prompt, text_of(line, "completion", line.fields["completion"]))


def _conversation(line: Line) -> Conversation:
    value = line.fields["messages"]
    if not isinstance(value, list):
        raise DataError(f"{line.where}: messages must be an array, found {json_type(value)}")
    messages = tuple(_message(line, index, item) for index, item in enumerate(value))
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{line.where}: messages hold no turn of the assistant, so there is nothing to train on")
    return Conversation(messages)


def _message(line: Line, index: int, item: Any) -> Message:
    name = f"messages[{index}]"
    if not isinstance(item, dict) or item.keys() != {"role", "content"}:
        raise DataError(f"{line.where}: {name} must be an object with the fields role and content alone")
    if item["role"] not in ROLES:
        raise DataError(f"{line.where}: {name}.role must be one of {', '.join(ROLES)}; found {item['role']!r}")
    return Message(item["role"], text_of(line, f"{name}.content", item["content"]))


_LAYOUTS: dict[tuple[str, ...], Callable[[Line], Record]] = {
    ("text",): _text,
    ("prompt", "completion"): _completion,
    ("messages",): _conversation,
}
