"""The three layouts of a record, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import DataError
from obfuscatune.training.data_files import (
    ROLES,
    Completion,
    Conversation,
    Line,
    Message,
    Record,
    Text,
)
from obfuscatune.training.layouts import detect_format, parse_task_record
from obfuscatune.training.tasks import TASKS

words = st.text(min_size=1).filter(str.strip)
messages = st.lists(st.builds(Message, st.sampled_from(ROLES), words), min_size=1).filter(
    lambda turns: any(turn.role == "assistant" for turn in turns)
)


def line(fields: dict) -> Line:
    return Line("notes.jsonl:7", fields)


def read(found: Line) -> Record:
    return detect_format(found).read(found)


@given(words)
def test_text(text):
    assert read(line({"text": text})) == Text(text)


@given(st.text().filter(lambda text: text == "" or text.strip()), words)
def test_prompt_and_completion(prompt, completion):
    assert read(line({"prompt": prompt, "completion": completion})) == Completion(prompt, completion)


@given(messages)
def test_messages(turns):
    fields = {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}
    assert read(line(fields)) == Conversation(tuple(turns))


@given(st.dictionaries(st.sampled_from(["text", "prompt", "completion", "messages", "label"]), st.integers() | words))
def test_any_fields_are_a_record_or_a_data_error(fields):
    try:
        read(line(fields))
    except DataError as error:
        assert "notes.jsonl:7" in str(error)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "found the fields: none"),
        ({"question": "?", "answer": "!"}, "found the fields: answer, question. Other names are mapped by --fields"),
        ({"chosen": "a", "rejected": "b"}, "expected the fields messages; or conversations; or prompt and completion;"),
        ({"prompt": "a"}, "found the fields: prompt"),
        ({"text": 3}, "text must be a string, found a number"),
        ({"text": None}, "missing or null: text"),
        ({"text": "  \n"}, "text is empty"),
        ({"prompt": " ", "completion": "a"}, "prompt is empty"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": ["a"], "completion": "b"}, "completion must be a list of messages, as the other is"),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, "tools need a prompt and a completion that are lists"),
        ({"messages": "hi"}, "messages must be an array, found a string"),
        ({"messages": []}, "no turn of the assistant"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": "hi", "weight": 0}]}, "no turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": "hi", "weight": 0.5}]}, r"messages\[0\].weight must be 0"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "assistant"}]}, r"messages\[0\] must be an object with the fields role and content"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\[0\].role must be one of"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"messages\[0\].role must be one of"),
        ({"messages": [{"role": "assistant", "content": 1}]}, r"messages\[0\].content must be a string"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"messages\[0\].content must be a string, found null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            r"messages\[0\].content\[0\] must be a part of type text, found one of type image_url",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            r"content\[0\] must be a part of type text, found a str",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, r"tool_calls\[0\] must be an object that names"),
        ({"messages": [{"role": "assistant", "tool_calls": {"name": "f"}}]}, "tool_calls must be an array"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "arguments is a string that holds no JSON",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "3"}]}]},
            "arguments must be an object, found a number",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": ["f"]}, "tools must be an array of objects"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, r"conversations\[0\].from must be one of system, human"),
        ({"conversations": [{"from": "gpt", "value": ""}]}, r"conversations\[0\].value is empty"),
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input must be a string, found a number"),
    ],
)
def test_each_fault_is_named_with_its_line(fields, message):
    with pytest.raises(DataError, match=message) as caught:
        read(line(fields))
    assert str(caught.value).startswith("notes.jsonl:7: ")


def test_a_task_record_is_its_evaluation_prompt_and_gold_answer():
    record = line({"goal": "open a jar", "sol1": "twist", "sol2": "sing", "label": 0})
    assert parse_task_record(TASKS["piqa"], record) == Completion("Question: open a jar\nAnswer:", " twist")
