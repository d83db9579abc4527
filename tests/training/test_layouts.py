"""Records as other tools have them, and what becomes of them here."""

import pytest

from obfuscatune.training.data_files import Conversation, Line, Message, split_turns
from obfuscatune.training.layouts import detect_format

ASKED, ANSWERED = Message("user", "Who?"), Message("assistant", "Lily")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def parse(**fields):
    line = Line("notes.jsonl:7", fields)
    return detect_format(line).read(line)


@pytest.mark.parametrize("context", [{}, {"input": ""}, {"input": None}, {"input": " "}])
def test_alpaca_without_input(context):
    assert parse(instruction="Who?", output="Lily", **context) == Conversation((ASKED, ANSWERED))


def test_alpaca_with_input_and_system():
    record = parse(instruction="Sum up.", input="A long day.", output="Long.", system="Be brief.", text="all at once")
    asked = Message("user", "Sum up.\n\nA long day.")
    assert record == Conversation((Message("system", "Be brief."), asked, Message("assistant", "Long.")))


def test_sharegpt():
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Lily"}]
    assert parse(conversations=turns, id="x") == Conversation((ASKED, ANSWERED))
    assert parse(conversations=turns, system="Be kind.").messages[0] == Message("system", "Be kind.")
    assert parse(conversations=[{"role": "user", "content": "Who?"}, {"from": "gpt", "value": "Lily"}]) == Conversation(
        (ASKED, ANSWERED)
    )


def test_sharegpt_with_a_function():
    turns = [
        {"from": "human", "value": "rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "yes"},
        {"from": "gpt", "value": "Lily"},
    ]
    record = parse(conversations=turns, tools='[{"name": "weather"}]')
    assert record.messages[1:3] == (Message("assistant", "", {"tool_calls": [CALL]}), Message("tool", "yes"))
    assert record.tools == ({"name": "weather"},)


def test_a_conversational_prompt_and_completion_trains_on_the_completion():
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    record = parse(prompt=[*prompt, {"role": "user", "content": "Who?"}], completion=[vars(ANSWERED)])
    assert [message.is_trained for message in record.messages] == [False, False, False, True]
    assert record.messages[-1] == ANSWERED


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_tool_calls_have_their_arguments_as_an_object(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": ""}]
    record = parse(messages=turns)
    assert record.messages[0].fields()["tool_calls"] == [{"id": "1", **CALL}]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "Li"}, {"type": "text", "text": "ly"}]
    assert parse(messages=[vars(ASKED), {"role": "assistant", "content": parts}]) == Conversation((ASKED, ANSWERED))


def test_what_a_template_may_ask_for_is_kept():
    turn = {"role": "assistant", "content": "Lily", "reasoning_content": "hm", "id": 3}
    (message,) = parse(messages=[turn]).messages
    assert message.fields() == {"role": "assistant", "content": "Lily", "reasoning_content": "hm"}


def test_splitting_gives_each_trained_turn_its_own_end():
    silent = Message("assistant", "no", trained=False)
    record = Conversation((ASKED, ANSWERED, ASKED, silent, ASKED, ANSWERED))
    lengths = []
    for one in split_turns(record):
        lengths.append(len(one.messages))
        assert [message.is_trained for message in one.messages] == [False] * (len(one.messages) - 1) + [True]
    assert lengths == [2, 6]
