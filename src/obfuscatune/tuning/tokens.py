"""Text to token ids, one way for training, scoring and generation, so that all three see the same prompt.

A prompt and its continuation are tokenised together and split after as many tokens as the prompt has alone,
white space at the prompt's end going to the continuation: `_encode_pair` of lm-evaluation-harness.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from obfuscatune.tuning.records import Completion, Conversation, Message, Record, Text
from obfuscatune.wire.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_WINDOW = 2048
"""Tokens, for a model whose config names no limit: what lm-evaluation-harness takes then."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one record, and for each whether the loss counts it."""

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]


def context_window(config: Any) -> int:
    """The most tokens that a Hugging Face model takes at once."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_WINDOW


def leading_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What this tokenizer puts before every text: its beginning-of-sequence token, or nothing."""
    ids = tokenizer("")["input_ids"]
    return list(ids[:1]) if ids and ids[0] == tokenizer.bos_token_id else []


def end_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The end-of-sequence token.

    Raises:
        ConfigError: the tokenizer has none, so that a model could learn no end.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer names no end-of-sequence token; set eos_token in its configuration")
    return int(tokenizer.eos_token_id)


def stop_ids(tokenizer: "PreTrainedTokenizerBase", generation_config: Any) -> list[int]:
    """All tokens that end what a model writes: the tokenizer's, and those that its generation config names beside it.

    Raises:
        ConfigError: the tokenizer has none.
    """
    named = generation_config.eos_token_id
    others = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({end_id(tokenizer), *others})


def encode_open(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Text that a model is to continue, as it stands. Never without a token."""
    ids = leading_ids(tokenizer) + _plain_ids(tokenizer, text)
    return ids or [_first_id(tokenizer)]


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """The prompt of a completion, as training and scoring see it: without white space at its end."""
    return encode_open(tokenizer, prompt.rstrip())


def encode_pair(tokenizer: "PreTrainedTokenizerBase", prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what follows it, tokenised together. The second may be empty."""
    kept = prompt.rstrip()
    whole = _plain_ids(tokenizer, prompt + continuation)
    return encode_prompt(tokenizer, prompt), whole[len(_plain_ids(tokenizer, kept)) :]


def encode_record(tokenizer: "PreTrainedTokenizerBase", record: Record) -> Encoded:
    """Token ids of a record, an end-of-sequence token last.

    A conversation is rendered by the tokenizer's chat template, which has its own way to end a turn; without
    one, as `User: …` and `Assistant: …` lines, an end-of-sequence token after each turn of the assistant's.

    Raises:
        ConfigError: no end-of-sequence token; a chat template that cannot be followed turn by turn; a
            conversation with a tokenizer that does not tell where in the text a token lies.
    """
    match record:
        case Text(text):
            lead, ids = leading_ids(tokenizer), [*_plain_ids(tokenizer, text), end_id(tokenizer)]
            return Encoded((*lead, *ids), (False,) * len(lead) + (True,) * len(ids))
        case Completion(prompt, completion):
            context, ids = encode_pair(tokenizer, prompt, completion)
            ids.append(end_id(tokenizer))
            return Encoded((*context, *ids), (False,) * len(context) + (True,) * len(ids))
        case Conversation(messages):
            return _encode_conversation(tokenizer, messages)


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant's next turn begins."""
    lead, rendered = _render(tokenizer, messages, open_turn=True)
    return lead + _plain_ids(tokenizer, rendered)


def _encode_conversation(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> Encoded:
    if not tokenizer.is_fast:
        raise ConfigError("training on messages needs a tokenizer with a tokenizer.json, to tell whose turn a token is")
    lead, rendered = _render(tokenizer, messages, open_turn=False)
    spans = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            _, before = _render(tokenizer, messages[:index], open_turn=True)
            _, after = _render(tokenizer, messages[: index + 1], open_turn=False)
            if not (rendered.startswith(after) and after.startswith(before)):
                raise ConfigError(
                    "this tokenizer's chat template rewrites earlier turns, so a turn's tokens cannot be "
                    "told; give each turn as a record of its own, with prompt and completion"
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    trained = [any(start <= first < last <= stop for start, stop in spans) for first, last in offsets]
    return Encoded((*lead, *ids), (*(False for _ in lead), *trained))


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, open_turn: bool
) -> tuple[list[int], str]:
    """Ids to put first, and the text; `open_turn` ends it where the assistant would begin to write."""
    if tokenizer.chat_template is None:
        turns = [_plain_turn(tokenizer, message) for message in messages] + ["Assistant:"] * open_turn
        return leading_ids(tokenizer), "\n".join(turns)
    fields = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(fields, tokenize=False, add_generation_prompt=open_turn)
    except Exception as error:  # a template is a program of the model's author and raises what it likes
        raise ConfigError(f"the tokenizer's chat template refuses a conversation: {error}") from error
    return [], str(text)  # a template writes the beginning-of-sequence token itself


def _plain_turn(tokenizer: "PreTrainedTokenizerBase", message: Message) -> str:
    end = tokenizer.convert_ids_to_tokens(end_id(tokenizer)) if message.role == "assistant" else ""
    return f"{message.role.capitalize()}: {message.content}{end}"


def _plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None else end_id(tokenizer)
