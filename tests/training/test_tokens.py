"""Token ids and what is trained on, against the text that they stand for."""

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, LlamaConfig

from obfuscatune.errors import ConfigError, DataError
from obfuscatune.training.data_files import Completion, Conversation, Message, Text
from obfuscatune.training.tokens import (
    DEFAULT_WINDOW,
    context_window,
    encode_open,
    encode_pair,
    encode_prompt,
    encode_record,
    end_id,
    leading_ids,
    render_prompt,
    stop_ids,
)

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last %}{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}"
TALK = (Message("user", "hi"), Message("assistant", "yes"), Message("user", "so"), Message("assistant", "no"))


@pytest.fixture
def llama_like(stories260k):
    return AutoTokenizer.from_pretrained(stories260k)


@pytest.fixture
def with_template(tokenizer):
    def make(template):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        return changed

    return make


def trained_text(tokenizer, encoded):
    ids = [i for i, trained in zip(encoded.input_ids, encoded.trained, strict=True) if trained]
    return tokenizer.decode(ids)


def test_text_is_trained_on_whole_and_ends(tokenizer):
    encoded = encode_record(tokenizer, Text("Once more"))
    assert tokenizer.decode(encoded.input_ids) == "Once more<|end|>"
    assert all(encoded.trained)


def test_only_the_completion_is_trained_on(tokenizer):
    encoded = encode_record(tokenizer, Completion("Q: 1+1\nA:", " two"))
    assert tokenizer.decode(encoded.input_ids) == "Q: 1+1\nA: two<|end|>"
    assert trained_text(tokenizer, encoded) == " two<|end|>"


def test_white_space_at_the_prompts_end_belongs_to_the_completion(tokenizer):
    encoded = encode_record(tokenizer, Completion("Q: 1+1\nA: ", "two"))
    assert trained_text(tokenizer, encoded) == " two<|end|>"
    assert encode_prompt(tokenizer, "A: \n") == encode_prompt(tokenizer, "A:")


def test_an_empty_prompt_begins_with_one_token(tokenizer, llama_like):
    assert encode_pair(tokenizer, "", "ab")[0] == [tokenizer.eos_token_id]
    assert encode_pair(llama_like, "", "ab")[0] == [llama_like.bos_token_id]
    assert encode_open(tokenizer, "") == [tokenizer.eos_token_id]


def test_the_beginning_token_is_the_tokenizers_own_and_untrained(tokenizer, llama_like):
    assert leading_ids(tokenizer) == []
    assert leading_ids(llama_like) == [1]
    encoded = encode_record(llama_like, Text("Lily"))
    assert encoded.input_ids == (*llama_like("Lily").input_ids, llama_like.eos_token_id)
    assert encoded.trained == (False, *[True] * (len(encoded.input_ids) - 1))


@given(st.text(alphabet="ab :.\n", max_size=8), st.text(alphabet="ab :.\n", min_size=1, max_size=8))
def test_a_pair_is_the_whole_text_cut_in_two(tokenizer, prompt, continuation):
    context, rest = encode_pair(tokenizer, prompt, continuation)
    if prompt.strip():  # else the context is the beginning token
        assert tokenizer.decode(context + rest) == prompt + continuation
    assert tokenizer.decode(rest).endswith(continuation)


def test_a_conversation_without_template_trains_on_the_assistants_turns(tokenizer, llama_like):
    encoded = encode_record(tokenizer, Conversation(TALK))
    end = "<|end|>"
    assert tokenizer.decode(encoded.input_ids) == f"User: hi\nAssistant: yes{end}\nUser: so\nAssistant: no{end}"
    assert trained_text(tokenizer, encoded) == f" yes{end} no{end}"
    encoded = encode_record(llama_like, Conversation(TALK))
    assert encoded.input_ids[0] == llama_like.bos_token_id
    assert trained_text(llama_like, encoded) == "yes</s> no</s>"


def test_a_chat_template_is_followed(with_template):
    tokenizer = with_template(CHATML)
    encoded = encode_record(tokenizer, Conversation(TALK))
    assert tokenizer.decode(encoded.input_ids) == (
        "<user>hi<|end|><assistant>yes<|end|><user>so<|end|><assistant>no<|end|>"
    )
    assert trained_text(tokenizer, encoded) == "yes<|end|>no<|end|>"


def test_generation_continues_where_training_began(tokenizer, with_template):
    for chosen in (tokenizer, with_template(CHATML)):
        prompt = render_prompt(chosen, TALK[:1])
        encoded = encode_record(chosen, Conversation(TALK[:2]))
        assert encoded.input_ids[: len(prompt)] == tuple(prompt)
        assert not any(encoded.trained[: len(prompt)])
        assert encoded.trained[len(prompt)]


def test_a_template_that_rewrites_earlier_turns_is_refused(with_template):
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode_record(with_template(FORGETFUL), Conversation(TALK))


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content.split('</think>')[-1] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WITH_TOOLS = (
    "{% for t in tools or [] %}<tool>{{ t.function.name }}<|end|>{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_what_a_template_marks_as_generated_is_trained_on(with_template):
    tokenizer = with_template(MARKED)
    reasoned = Conversation((TALK[0], Message("assistant", "hm</think>yes"), *TALK[2:]))
    encoded = encode_record(tokenizer, reasoned)
    assert trained_text(tokenizer, encoded) == "yes<|end|>no<|end|>"
    untrained = replace(TALK[1], trained=False)
    encoded = encode_record(tokenizer, Conversation((TALK[0], untrained, *TALK[2:])))
    assert trained_text(tokenizer, encoded) == "no<|end|>"


def test_a_turn_of_weight_zero_is_seen_and_not_trained_on(tokenizer, with_template):
    for chosen in (tokenizer, with_template(CHATML)):
        untrained = Conversation((TALK[0], replace(TALK[1], trained=False), *TALK[2:]))
        encoded = encode_record(chosen, untrained)
        assert encoded.input_ids == encode_record(chosen, Conversation(TALK)).input_ids
        assert trained_text(chosen, encoded).strip() == "no<|end|>"


def test_tools_and_their_calls_are_shown_by_the_template(with_template):
    tokenizer = with_template(WITH_TOOLS)
    turns = (
        Message("user", "rain?"),
        Message("assistant", "", {"tool_calls": [CALL]}),
        Message("tool", "yes"),
        TALK[1],
    )
    encoded = encode_record(tokenizer, Conversation(turns, ({"type": "function", "function": {"name": "weather"}},)))
    assert tokenizer.decode(encoded.input_ids) == (
        "<tool>weather<|end|><user>rain?<|end|><assistant>weather(Oslo)<|end|><tool>yes<|end|><assistant>yes<|end|>"
    )
    assert trained_text(tokenizer, encoded) == "weather(Oslo)<|end|>yes<|end|>"


def test_tools_that_would_not_be_seen_are_refused(tokenizer, with_template):
    calling = Conversation((TALK[0], Message("assistant", "", {"tool_calls": [CALL]})))
    given = Conversation(TALK, ({"type": "function", "function": {"name": "weather"}},))
    for conversation in (calling, given):
        with pytest.raises(DataError, match="leaves out the tool weather"):
            encode_record(with_template(CHATML), conversation)
        with pytest.raises(DataError, match="takes a tokenizer with a chat template"):
            encode_record(tokenizer, conversation)


def test_a_template_that_refuses_is_reported(with_template):
    with pytest.raises(DataError, match="refuses a conversation: no system"):
        encode_record(with_template("{{ raise_exception('no system') }}"), Conversation(TALK))


def test_a_tokenizer_without_end_is_refused(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    for record in (Text("a"), Completion("a", "b"), Conversation(TALK)):
        with pytest.raises(ConfigError, match="no end-of-sequence token"):
            encode_record(endless, record)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        end_id(endless)


@pytest.mark.parametrize(
    ("named", "stops"), [(None, [256]), (256, [256]), (7, [7, 256]), ([256, 9, 7], [7, 9, 256]), ([], [256])]
)
def test_a_text_ends_with_any_of_the_ends(tokenizer, named, stops):
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=named)) == stops


def test_the_window_is_the_configs():
    assert context_window(GPT2Config(n_positions=77)) == 77
    assert context_window(LlamaConfig(max_position_embeddings=99)) == 99
    assert context_window(object()) == DEFAULT_WINDOW
