"""Which fields a record has, and what they mean. A file has one layout: that of its first record.

Conversations are as people have them: OpenAI's `messages`, ShareGPT's `conversations`, TRL's lists of messages.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from obfuscatune.errors import ConfigError, DataError
from obfuscatune.training.data_files import (
    ROLES,
    Completion,
    Conversation,
    Line,
    Message,
    Record,
    Text,
    json_type,
    text_of,
)
from obfuscatune.training.tasks import Task


@dataclass(frozen=True)
class Layout:
    """Fields that a record must have, those that it may have, and how they are read."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Line], Record]

    @property
    def fields(self) -> set[str]:
        """All fields that mean something in this layout."""
        return {*self.required, *self.optional}


@dataclass(frozen=True)
class Format:
    """The layout of a file, and which of its columns stand for which of the layout's fields.

    `columns` maps a field to the column that holds it; the other fields have their own names.
    """

    layout: Layout
    columns: Mapping[str, str] = field(default_factory=dict)

    def read(self, line: Line) -> Record:
        """Read one record.

        Raises:
            DataError: a missing field, a wrong type, an empty text or completion, an unknown role, no turn of
                the assistant's that is trained on.
        """
        renamed = _renamed(line, self.columns)
        missing = [name for name in self.layout.required if renamed.fields.get(name) is None]
        if missing:
            raise DataError(
                f"{line.where}: missing or null: {', '.join(missing)}; the file's records are {self.layout.name}, "
                f"and this one has the fields: {_listed(line)}"
            )
        return self.layout.read(renamed)

    def ignored(self, line: Line) -> set[str]:
        """The columns that mean nothing in this layout, and such fields of messages as `messages[].id`."""
        renamed = _renamed(line, self.columns).fields
        inner = {f"{name}[].{key}" for name in self.layout.required for key in unknown_fields(renamed[name])}
        return {name for name in renamed if name not in self.layout.fields} | inner


def detect_format(line: Line, columns: Mapping[str, str] | None = None) -> Format:
    """The format of a file, told by its first record: the first of `LAYOUTS` whose fields are all there.

    Args:
        columns: Fields that the user has named columns for; the layout is then one that has these fields.

    Raises:
        DataError: no layout fits.
    """
    columns = columns or {}
    fields = _renamed(line, columns).fields
    filled = {name for name, value in fields.items() if value is not None}
    for present in (filled, fields.keys()):
        for layout in LAYOUTS:
            if present >= set(layout.required) and columns.keys() <= layout.fields:
                return Format(layout, columns)
    expected = "; or ".join(" and ".join(layout.required) for layout in LAYOUTS)
    raise DataError(
        f"{line.where}: expected the fields {expected}; found the fields: {_listed(line)}. "
        "Other names are mapped by --fields, such as --fields prompt=question,completion=answer"
    )


def check_columns(columns: Mapping[str, str]) -> None:
    """See that a user's names are for fields that some layout has.

    Raises:
        ConfigError: one is not.
    """
    if not any(columns.keys() <= layout.fields for layout in LAYOUTS):
        known = "; ".join(", ".join(sorted(layout.fields)) for layout in LAYOUTS)
        raise ConfigError(f"--fields: no layout has the fields {', '.join(columns)} together; they are: {known}")


def parse_task_record(task: Task, line: Line) -> Completion:
    """Read one of a task's own records as its evaluation prompt and the gold answer.

    Raises:
        DataError: as the task's own reader says.
    """
    question = task.read(line)
    return Completion(question.prompt, " " + question.choices[question.gold[0]])


def _listed(line: Line) -> str:
    return ", ".join(sorted(line.fields)) or "none"


def _renamed(line: Line, columns: Mapping[str, str]) -> Line:
    if not columns:
        return line
    for name, column in columns.items():
        if column not in line.fields:
            raise DataError(
                f"{line.where}: there is no field {column}, which --fields names for {name}; "
                f"found the fields: {_listed(line)}"
            )
    taken = {*columns.values(), *columns}
    kept = {name: value for name, value in line.fields.items() if name not in taken}
    return Line(line.where, kept | {name: line.fields[column] for name, column in columns.items()})


def _text(line: Line) -> Text:
    return Text(text_of(line, "text", line.fields["text"]))


def _completion(line: Line) -> Completion | Conversation:
    """Both strings, or, as in TRL, both lists of messages, of which those of the completion are trained on."""
    prompt, completion = line.fields["prompt"], line.fields["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        for name, value in (("prompt", prompt), ("completion", completion)):
            if not isinstance(value, list):
                raise DataError(f"{line.where}: {name} must be a list of messages, as the other is")
        given = tuple(replace(message, trained=False) for message in read_messages(line, "prompt"))
        return _conversation(line, "completion", (*given, *read_messages(line, "completion")))
    if line.fields.get("tools"):
        raise DataError(f"{line.where}: tools need a prompt and a completion that are lists of messages")
    if prompt != "":  # an empty prompt is one: the model starts from nothing
        prompt = text_of(line, "prompt", prompt)
    return Completion(prompt, text_of(line, "completion", completion))


def _messages(line: Line) -> Conversation:
    return _conversation(line, "messages", read_messages(line, "messages"))


def _sharegpt(line: Line) -> Conversation:
    turns = read_messages(line, "conversations")
    return _conversation(line, "conversations", (*_system(line), *turns))


def _alpaca(line: Line) -> Conversation:
    asked = text_of(line, "instruction", line.fields["instruction"])
    context = line.fields.get("input") or ""
    if not isinstance(context, str):
        raise DataError(f"{line.where}: input must be a string, found {json_type(context)}")
    if context.strip():
        asked = f"{asked}\n\n{context}"
    answer = text_of(line, "output", line.fields["output"])
    return Conversation((*_system(line), Message("user", asked), Message("assistant", answer)))


def _system(line: Line) -> tuple[Message, ...]:
    """The field `system` as a message, where it is there and holds something."""
    text = line.fields.get("system") or ""
    if not isinstance(text, str):
        raise DataError(f"{line.where}: system must be a string, found {json_type(text)}")
    return (Message("system", text),) if text.strip() else ()


def _conversation(line: Line, name: str, messages: tuple[Message, ...]) -> Conversation:
    if not any(message.is_trained for message in messages):
        raise DataError(f"{line.where}: {name} hold no turn of the assistant to train on")
    return Conversation(messages, read_tools(line))


LAYOUTS = (
    Layout("conversations (messages)", ("messages",), ("tools",), _messages),
    Layout("conversations (ShareGPT)", ("conversations",), ("system", "tools"), _sharegpt),
    Layout("prompt and completion", ("prompt", "completion"), ("tools",), _completion),
    Layout("instructions (Alpaca)", ("instruction", "output"), ("input", "system"), _alpaca),
    Layout("text", ("text",), (), _text),
)
"""In the order in which they are tried: a `text` beside a prompt and its completion repeats them."""
UPLOADED_LAYOUTS = ("conversations (messages)", "prompt and completion")
"""Names of those that the service takes: OpenAI's two."""


_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_FOR_TEMPLATE = ("name", "tool_call_id", "reasoning_content")
_KNOWN = {"role", "content", "from", "value", "weight", "tool_calls", *_FOR_TEMPLATE}


def read_messages(line: Line, name: str) -> tuple[Message, ...]:
    """The conversation in the field `name`: an array of objects with `role` and `content`, or `from` and `value`.

    Raises:
        DataError: it is none, naming the message and what is wrong with it.
    """
    value = line.fields[name]
    if not isinstance(value, list):
        raise DataError(f"{line.where}: {name} must be an array, found {json_type(value)}")
    return tuple(_message(line, f"{name}[{index}]", item) for index, item in enumerate(value))


def read_tools(line: Line) -> tuple[Mapping[str, Any], ...]:
    """The JSON schemas in the field `tools`, which may be absent, or hold them as JSON in a string.

    Raises:
        DataError: it is no array of objects.
    """
    value = line.fields.get("tools")
    if isinstance(value, str):
        value = _parsed(line, "tools", value) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{line.where}: tools must be an array of objects, a JSON schema each")
    return tuple(value)


def unknown_fields(value: object) -> Iterator[str]:
    """Names of the fields in a list of messages that mean nothing here."""
    for item in value if isinstance(value, list) else ():
        if isinstance(item, dict):
            yield from item.keys() - _KNOWN


def _message(line: Line, name: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{line.where}: {name} must be an object, found {json_type(item)}")
    if "from" in item:
        return _sharegpt_message(line, name, item)
    missing = {"role", "content"} - item.keys()
    if "role" in missing or ("content" in missing and not item.get("tool_calls")):
        raise DataError(f"{line.where}: {name} must be an object with the fields role and content, or from and value")
    role = item["role"]
    if role not in ROLES:
        raise DataError(f"{line.where}: {name}.role must be one of {', '.join(ROLES)}; found {role!r}")
    details = {key: item[key] for key in _FOR_TEMPLATE if item.get(key) is not None}
    if item.get("tool_calls"):
        details["tool_calls"] = _tool_calls(line, f"{name}.tool_calls", item["tool_calls"])
    may_be_empty = role == "tool" or "tool_calls" in details
    content = _content(line, f"{name}.content", item.get("content"), may_be_empty=may_be_empty)
    return Message(role, content, details, trained=_weight(line, name, item))


def _sharegpt_message(line: Line, name: str, item: Mapping[str, Any]) -> Message:
    speaker, value = item["from"], item.get("value")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"{line.where}: {name}.from must be one of {', '.join(_SHAREGPT_ROLES)}; found {speaker!r}")
    trained = _weight(line, name, item)
    if speaker == "function_call":
        calls = _parsed(line, f"{name}.value", text_of(line, f"{name}.value", value))
        calls = calls if isinstance(calls, list) else [calls]
        return Message(role, "", {"tool_calls": _tool_calls(line, f"{name}.value", calls)}, trained)
    return Message(role, _content(line, f"{name}.value", value, may_be_empty=role == "tool"), trained=trained)


def _content(line: Line, name: str, value: Any, *, may_be_empty: bool) -> str:
    """A string, or an array of parts of type text, which are joined."""
    if may_be_empty and value in (None, "", []):
        return ""
    if isinstance(value, list):
        value = "".join(_part(line, f"{name}[{index}]", part) for index, part in enumerate(value))
    return value if may_be_empty and isinstance(value, str) else text_of(line, name, value)


def _part(line: Line, name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        found = json_type(part) if kind is None else f"one of type {kind}"
        raise DataError(f"{line.where}: {name} must be a part of type text, found {found}: only text can be trained on")
    if not isinstance(part.get("text"), str):
        raise DataError(f"{line.where}: {name}.text must be a string, found {json_type(part.get('text'))}")
    return str(part["text"])


def _weight(line: Line, name: str, item: Mapping[str, Any]) -> bool:
    """Whether a turn is trained on: its `weight` is 1, or not given."""
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"{line.where}: {name}.weight must be 0 (do not train on this turn) or 1, found {weight!r}")
    return weight != 0


def _tool_calls(line: Line, name: str, value: Any) -> list[dict[str, Any]]:
    """Calls as chat templates expect them: the arguments are an object, not a string that holds one."""
    if not isinstance(value, list):
        raise DataError(f"{line.where}: {name} must be an array, found {json_type(value)}")
    calls = []
    for index, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{line.where}: {name}[{index}] must be an object that names a function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(line, f"{name}[{index}].arguments", arguments) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise DataError(f"{line.where}: {name}[{index}].arguments must be an object, found {json_type(arguments)}")
        outer = call if "function" in call else {"type": "function"}
        calls.append({**outer, "function": {**function, "arguments": arguments}})
    return calls


def _parsed(line: Line, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{line.where}: {name} is a string that holds no JSON: {error}") from error
