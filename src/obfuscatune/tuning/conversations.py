"""Conversations as people have them: OpenAI's `messages`, ShareGPT's `conversations`, TRL's lists of messages."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from obfuscatune.tuning.jsonl import Line, json_type, text_of
from obfuscatune.tuning.records import ROLES, Message
from obfuscatune.wire.errors import DataError

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
        return _sharegpt(line, name, item)
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


def _sharegpt(line: Line, name: str, item: Mapping[str, Any]) -> Message:
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
