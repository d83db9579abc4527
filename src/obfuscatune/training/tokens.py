"""Text to token ids, one way for training, scoring and generation, so that all three see the same prompt.

A prompt and its continuation are tokenised together and split after as many tokens as the prompt has alone,
white space at the prompt's end going to the continuation: `_encode_pair` of lm-evaluation-harness.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obfuscatune.errors import ConfigError, DataError, ModelFileError
from obfuscatune.training.data_files import Completion, Conversation, Message, Record, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
DEFAULT_WINDOW = 2048
"""Tokens, for a model whose config names no limit: what lm-evaluation-harness takes then."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one record, and for each whether the loss counts it."""

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts: the model predicts each from the one before, so the first never."""
        return sum(self.trained[1:])

    def first(self, count: int) -> "Encoded":
        """The first `count` tokens."""
        return Encoded(self.input_ids[:count], self.trained[:count])


def read_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model's directory; no code of its own is run.

    Raises:
        ModelFileError: there is none, or it cannot be used.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise what they like, Exception itself too
        raise ModelFileError(f"{directory} has no tokenizer that can be used: {error}") from error


def context_window(config: Any) -> int:
    """The most tokens that a Hugging Face model takes at once; of a composite model, what its text model takes."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_WINDOW


def embedding_rows(config: Any) -> int | None:
    """Rows of the embedding that a Hugging Face config gives its model; None where it does not say."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows = getattr(text_config, "vocab_size", None)
    return rows if isinstance(rows, int) else None


def check_ids(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], rows: int | None) -> None:
    """See that the model has an embedding for every token.

    Args:
        rows: Rows of the embedding; nothing is checked if None.

    Raises:
        DataError: a token is outside, as where tokens were added to a tokenizer and no rows to the model.
    """
    outside = next((i for i in ids if rows is not None and i >= rows), None)
    if outside is not None:
        raise DataError(
            f"the token {tokenizer.convert_ids_to_tokens(outside)!r} has number {outside}, and the model's embedding "
            f"has rows 0 to {(rows or 0) - 1} alone: this tokenizer is not the one that the model was made with"
        )


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
        ConfigError: no end-of-sequence token; a conversation with a tokenizer that does not tell where in the text
            a token lies.
        DataError: a chat template that refuses the conversation, that leaves out a tool, or that rewrites earlier
            turns (`rewrites_turns`); tools or the like, and no chat template.
    """
    match record:
        case Text(text):
            lead, ids = leading_ids(tokenizer), [*_plain_ids(tokenizer, text), end_id(tokenizer)]
            return Encoded((*lead, *ids), (False,) * len(lead) + (True,) * len(ids))
        case Completion(prompt, completion):
            context, ids = encode_pair(tokenizer, prompt, completion)
            ids.append(end_id(tokenizer))
            return Encoded((*context, *ids), (False,) * len(context) + (True,) * len(ids))
        case Conversation():
            return _encode_conversation(tokenizer, record)


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant's next turn begins.

    Raises:
        DataError: the chat template refuses it.
    """
    rendered = _render(tokenizer, Conversation(tuple(messages)), open_turn=True)
    return _lead(tokenizer) + _plain_ids(tokenizer, rendered)


def rewrites_turns(tokenizer: "PreTrainedTokenizerBase", conversation: Conversation) -> bool:
    """Whether the chat template renders earlier turns otherwise once there are later ones.

    Some leave out past reasoning. What such a model saw when it wrote an earlier turn is then not in the text.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    return _trained_spans(tokenizer, conversation) is None


def _encode_conversation(tokenizer: "PreTrainedTokenizerBase", conversation: Conversation) -> Encoded:
    if not tokenizer.is_fast:
        raise ConfigError("training on messages needs a tokenizer with a tokenizer.json, to tell whose turn a token is")
    spans = _trained_spans(tokenizer, conversation)
    if spans is None:
        raise DataError(
            "this tokenizer's chat template rewrites earlier turns, as those do that leave out past reasoning, so "
            "they cannot all be trained on at once; --split-turns makes an example of each turn"
        )
    rendered = _render(tokenizer, conversation, open_turn=False)
    _check_tools(conversation, rendered)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    trained = [any(start <= first < last <= stop for start, stop in spans) for first, last in offsets]
    lead = _lead(tokenizer)
    return Encoded((*lead, *ids), (*(False for _ in lead), *trained))


def _trained_spans(
    tokenizer: "PreTrainedTokenizerBase", conversation: Conversation
) -> Sequence[tuple[int, int]] | None:
    """Where in the rendered text the turns lie that are trained on, in characters; None if that cannot be told."""
    marked = _marked_spans(tokenizer, conversation)
    if marked is not None:
        return marked
    rendered = _render(tokenizer, conversation, open_turn=False)
    spans = []
    for index, message in enumerate(conversation.messages):
        if message.is_trained:
            before = _render(tokenizer, _first(conversation, index), open_turn=True)
            after = _render(tokenizer, _first(conversation, index + 1), open_turn=False)
            if not (rendered.startswith(after) and after.startswith(before)):
                return None
            spans.append((len(before), len(after)))
    return spans


def _marked_spans(tokenizer: "PreTrainedTokenizerBase", conversation: Conversation) -> Sequence[tuple[int, int]] | None:
    """What the template itself marks by `{% generation %}` as the assistant's; None if it marks nothing.

    Raises:
        DataError: a turn is not to be trained on, and the marks do not tell which of them is this turn's.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    if tokenizer.chat_template is None:
        return None
    template = tokenizer.get_chat_template(tools=_tools(conversation))
    if not _GENERATION.search(template):
        return None
    with _template_faults():
        _, marks = render_jinja_template(
            [[message.fields() for message in conversation.messages]],
            tools=_tools(conversation),
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    turns = [message for message in conversation.messages if message.role == "assistant"]
    if len(marks[0]) == len(turns):
        return [span for span, turn in zip(marks[0], turns, strict=True) if turn.is_trained]
    if not all(turn.is_trained for turn in turns):
        raise DataError(
            f"the chat template marks {len(marks[0])} answers where there are {len(turns)}: not all are "
            "to be trained on, and which are cannot be told"
        )
    return list(marks[0])


def _check_tools(conversation: Conversation, rendered: str) -> None:
    """A template that knows nothing of tools leaves them out without a word."""
    calls = (call for message in conversation.messages for call in message.details.get("tool_calls", ()))
    functions = [part.get("function", part) for part in (*conversation.tools, *calls)]
    lost = next((str(it.get("name")) for it in functions if str(it.get("name")) not in rendered), None)
    if lost is not None:
        raise DataError(f"this tokenizer's chat template leaves out the tool {lost}: the model would not see it")


def _first(conversation: Conversation, count: int) -> Conversation:
    return replace(conversation, messages=conversation.messages[:count])


def _tools(conversation: Conversation) -> list[Mapping[str, Any]] | None:
    return list(conversation.tools) or None


def _lead(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids to put before a rendered conversation: a template writes the beginning-of-sequence token itself."""
    return leading_ids(tokenizer) if tokenizer.chat_template is None else []


def _render(tokenizer: "PreTrainedTokenizerBase", conversation: Conversation, *, open_turn: bool) -> str:
    """The text; `open_turn` ends it where the assistant would begin to write."""
    if tokenizer.chat_template is None:
        named = {name for message in conversation.messages for name in message.details}
        if conversation.tools:
            named.add("tools")
        if named:
            raise DataError(f"{', '.join(sorted(named))} in messages: that takes a tokenizer with a chat template")
        turns = [_plain_turn(tokenizer, message) for message in conversation.messages] + ["Assistant:"] * open_turn
        return "\n".join(turns)
    with _template_faults():
        return str(
            tokenizer.apply_chat_template(
                [message.fields() for message in conversation.messages],
                tools=_tools(conversation),
                tokenize=False,
                add_generation_prompt=open_turn,
            )
        )


@contextmanager
def _template_faults() -> Iterator[None]:
    """A template is a program of the model's author and raises what it likes."""
    try:
        yield
    except Exception as error:
        raise DataError(f"the tokenizer's chat template refuses a conversation: {error}") from error


def _plain_turn(tokenizer: "PreTrainedTokenizerBase", message: Message) -> str:
    end = tokenizer.convert_ids_to_tokens(end_id(tokenizer)) if message.role == "assistant" else ""
    return f"{message.role.capitalize()}: {message.content}{end}"


def _plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None else end_id(tokenizer)
