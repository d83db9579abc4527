"""A model's own words after a prompt, shown as they come; what `generate` and `chat` share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from obfuscatune.cli import output
from obfuscatune.cli.options import PROTECTION
from obfuscatune.cli.protection import Protection, resolved_profile
from obfuscatune.cli.session import ModelFiles, Session
from obfuscatune.errors import ConfigError, DataError
from obfuscatune.option import Option

if TYPE_CHECKING:
    from obfuscatune.enclave.pace import Pace

TEXT = "Text"
"""A heading of the help."""
NO_TOKEN = 2**62
"""Stands for the end of sequence where none is to be seen: generation goes on to its limit."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else drawn from the likeliest `top_p` of the mass.

    Each field is an option.

    Raises:
        ConfigError: a value outside its range.
    """

    max_new_tokens: Annotated[int, Option("The most to write.", TEXT)] = 64
    temperature: Annotated[float, Option("0 takes the likeliest token each time.", TEXT)] = 0.0
    top_p: Annotated[float, Option("Sample from the likeliest tokens of this share.", TEXT)] = 1.0
    seed: Annotated[int, Option("Of the sampling.", TEXT)] = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens: expected at least 1, found {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature: expected 0 or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p: expected more than 0, up to 1, found {self.top_p}")

    def room(self, config: Any) -> int:
        """Tokens that a prompt may have, so that the answer fits the model's window too."""
        from obfuscatune.training.tokens import context_window

        return context_window(config) - self.max_new_tokens

    def check(self, ids: Sequence[int], files: ModelFiles) -> None:
        """Refuse a prompt of more tokens, or of such as the model has no embedding for.

        Raises:
            DataError: it is one.
        """
        from obfuscatune.training.tokens import check_ids, embedding_rows

        config = files.config
        check_ids(files.tokenizer, ids, embedding_rows(config))
        if len(ids) > self.room(config):
            raise DataError(
                f"the prompt has {len(ids)} tokens and up to {self.max_new_tokens} are to be written, but the model "
                f"takes {self.room(config) + self.max_new_tokens} in all; shorten it or lower --max-new-tokens"
            )


@dataclass(frozen=True)
class Pacing:
    """Whether steps begin at the ticks of a clock. Each field is an option.

    Raises:
        ConfigError: a pace outside its range.
    """

    pace: Annotated[
        float | None,
        Option(
            "Begin each step at a multiple of so many milliseconds, as 50, so that only late ones show in their times.",
            PROTECTION,
            unset="each as soon as it can",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.pace is not None and not 0 < self.pace <= MOST_MILLISECONDS:
            raise ConfigError(
                f"--pace: expected milliseconds, more than 0 and up to {MOST_MILLISECONDS:,}, found {self.pace:g}"
            )

    def check(self, protection: Protection | None) -> None:
        """Return where there is a worker whose requests can be paced, or no pace.

        Raises:
            ConfigError: there is none.
        """
        if self.pace is None:
            return
        if protection is None:
            raise ConfigError("--plain sends nothing that could be timed: leave it out, or --pace")
        profile = resolved_profile(protection)
        if not profile.offload:
            raise ConfigError(f"--profile {profile.name} sends nothing that could be timed: leave out --pace")

    @contextmanager
    def kept(self, session: Session) -> "Iterator[Pace | None]":
        """Within it the model's steps are paced; None without a pace."""
        from obfuscatune.enclave.pace import paced

        if self.pace is None:
            yield None
            return
        with paced(session.model, self.pace / 1000) as pace:
            yield pace


MOST_MILLISECONDS = 60_000
"""Of a pace: whoever writes more means something else."""


@dataclass(frozen=True)
class AnswerPacing(Pacing):
    """A pace for answers, whose length it can hide."""

    full_length: Annotated[
        bool,
        Option(
            "With --pace: decode --max-new-tokens in any case and show the answer alone, so that nobody can count it.",
            PROTECTION,
        ),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full_length and self.pace is None:
            raise ConfigError("--full-length takes --pace beside it: times tell where an answer ends, too")


@dataclass(frozen=True)
class Written:
    """What the model wrote, and in how many tokens; the pace that was kept, if any."""

    text: str
    tokens: int
    pace: "Pace | None" = None


def tell_late(pace: "Pace | None") -> None:
    """Say how many steps came late, if any did."""
    if pace is not None and pace.late:
        output.notice(f"{pace.late} of {pace.steps} steps came late: a longer --pace hides more")


def counted(paces: "Sequence[Pace | None]") -> dict[str, float] | None:
    """Steps of all answers, and those that came late, for JSON; None without a pace."""
    kept = [pace for pace in paces if pace is not None]
    if not kept:
        return None
    return {
        "milliseconds": 1000 * kept[0].period_s,
        "steps": sum(pace.steps for pace in kept),
        "late": sum(pace.late for pace in kept),
    }


def decode(
    session: Session,
    files: ModelFiles,
    ids: Sequence[int],
    sampling: Sampling,
    pacing: AnswerPacing,
    *,
    show: Callable[[str], None] | None,
) -> Written:
    """Write on after `ids` until the end-of-sequence token or the limit, calling `show` with each piece of text.

    With `pacing.full_length` the model goes on to the limit in any case: what follows the end is made like the rest,
    and thrown away.
    """
    import torch
    from transformers.generation.streamers import BaseStreamer

    from obfuscatune.training.detokenize import Detokenizer
    from obfuscatune.training.tokens import end_id, stop_ids

    detokenizer = Detokenizer(files.tokenizer, ids)
    stops = stop_ids(files.tokenizer, session.model.generation_config)
    pieces: list[str] = []

    class Shown(BaseStreamer):  # type: ignore[misc]  # transformers is not checked; its class is Any
        prompt_seen = ended = False
        tokens = 0

        def put(self, value: torch.Tensor) -> None:
            if self.prompt_seen and not self.ended:
                (token,) = value.flatten().tolist()
                self.tokens += 1
                self.show(detokenizer.add([token]))
                if token in stops:
                    self.end()
            self.prompt_seen = True  # it comes first, as a whole

        def end(self) -> None:
            if not self.ended:
                self.show(detokenizer.rest())
            self.ended = True

        def show(self, text: str) -> None:
            pieces.append(text)
            if show is not None and text:
                show(text)

    end = end_id(files.tokenizer)
    inputs = torch.tensor([list(ids)], device=session.model.device)
    how = (
        {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        if sampling.temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    shown = Shown()
    with torch.random.fork_rng(), pacing.kept(session) as pace:
        torch.manual_seed(sampling.seed)
        session.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=end,
            eos_token_id=NO_TOKEN if pacing.full_length else stops,
            streamer=shown,
            **how,
        )
    return Written("".join(pieces), shown.tokens, pace)
