"""`obfuscatune chat`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Annotated

from obfuscatune.cli import options, output
from obfuscatune.cli.decoding import TEXT, AnswerPacing, Sampling, counted, decode, tell_late
from obfuscatune.cli.protection import Protection
from obfuscatune.cli.session import ModelFiles, open_files, open_session
from obfuscatune.option import Option

if TYPE_CHECKING:
    from obfuscatune.training.data_files import Message


@dataclass(frozen=True)
class TurnSampling(Sampling):
    """The sampling options of `chat`: the most new tokens are per turn."""

    max_new_tokens: Annotated[int, Option("The most in a turn.", TEXT)] = 256


def chat(
    system: Annotated[str | None, Option("Instructions to begin with.", TEXT)] = None,
    *,
    sampling: TurnSampling,
    model: options.Model = None,
    adapter: options.Adapter = None,
    provider_adapter: options.ProviderAdapter = None,
    dtype: options.Dtype = None,
    protection: Protection,
    pacing: AnswerPacing,
    as_json: options.AsJson = False,
) -> None:
    """Talk with a model, a line a turn, on a worker that learns neither the model nor what is said.

    Ends with the input. /reset forgets what was said. When the model's window is full, the oldest turns are left out.
    With --json, reads all turns first and prints the whole conversation.
    """
    from obfuscatune.training.data_files import Message

    wanted = protection.unless_plain()
    pacing.check(wanted)
    beginning = [] if system is None else [Message("system", output.checked_text(system, "--system"))]
    files = open_files(model)
    messages, paces = list(beginning), []
    opening = open_session(files, dtype=dtype, protection=wanted, adapter=adapter, provider_adapter=provider_adapter)
    with opening as session:
        for line in _lines():
            if line == "/reset":
                messages = list(beginning)
                continue
            messages.append(Message("user", line))
            ids = _fitting(messages, len(beginning), files, sampling)
            show = None if as_json else _without_leading_space()
            written = decode(session, files, ids, sampling, pacing, show=show)
            paces.append(written.pace)
            if not as_json:
                output.write_text("")
            tell_late(written.pace)
            messages.append(Message("assistant", written.text.strip()))
        link = session.link()
    if as_json:
        said = [message.fields() for message in messages]
        output.write_json({"protected": session.protected, "messages": said, "pace": counted(paces), "link": link})


def _lines() -> Iterator[str]:
    """What the user types, without empty lines; on a terminal, asked for."""
    for number in count(1):
        if sys.stdin.isatty():
            output.ask("you> ")
        line = output.read_input_line(number)
        if not line:
            return
        if line.strip():
            yield line.strip()


def _without_leading_space() -> Callable[[str], None]:
    """Prints an answer as it comes, from its first word on: many begin with line breaks."""
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        text = text if begun else text.lstrip()
        begun = begun or bool(text)
        output.write_part(text)

    return show


def _fitting(messages: "Sequence[Message]", fixed: int, files: ModelFiles, sampling: Sampling) -> list[int]:
    """Token ids of the conversation, without as many of the oldest exchanges as the window has no room for.

    Args:
        fixed: How many messages at the beginning always stay.

    Raises:
        DataError: the last message alone is too long, or has a token that the model has no embedding for.
    """
    from obfuscatune.training.tokens import render_prompt

    for first in range(fixed, len(messages), 2):  # a user's turn and the answer to it go together
        ids = render_prompt(files.tokenizer, [*messages[:fixed], *messages[first:]])
        if len(ids) <= sampling.room(files.config):
            break
    sampling.check(ids, files)
    return ids
