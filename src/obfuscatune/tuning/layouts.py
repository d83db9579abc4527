"""Which fields a record has, and what they mean. A file has one layout: that of its first record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from obfuscatune.tuning.conversations import read_messages, read_tools, unknown_fields
from obfuscatune.tuning.jsonl import Line, json_type, text_of
from obfuscatune.tuning.records import Completion, Conversation, Message, Record, Text
from obfuscatune.tuning.tasks import Task
from obfuscatune.wire.errors import ConfigError, DataError


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


def parse_record(line: Line) -> Record:
    """Read one record that stands for itself.

    Raises:
        DataError: as `detect_format` and `Format.read`.
    """
    return detect_format(line).read(line)


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
