"""A model's own words after a prompt, shown as they come; what `generate` and `chat` share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from obfuscatune.cli.session import ModelFiles, Session
from obfuscatune.errors import ConfigError, DataError
from obfuscatune.option import Option

TEXT = "Text"
"""A heading of the help."""


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
class Written:
    """What the model wrote, and in how many tokens."""

    text: str
    tokens: int


def decode(
    session: Session,
    files: ModelFiles,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    show: Callable[[str], None] | None,
) -> Written:
    """Write on after `ids` until the end-of-sequence token or the limit, calling `show` with each piece of text."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    from obfuscatune.training.detokenize import Detokenizer
    from obfuscatune.training.tokens import end_id, stop_ids

    detokenizer = Detokenizer(files.tokenizer, ids)
    pieces: list[str] = []

    class Shown(BaseStreamer):  # type: ignore[misc]  # transformers is not checked; its class is Any
        prompt_seen = False

        def put(self, value: torch.Tensor) -> None:
            if self.prompt_seen:
                self.show(detokenizer.add(value.flatten().tolist()))
            self.prompt_seen = True  # it comes first, as a whole

        def end(self) -> None:
            self.show(detokenizer.rest())

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
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        output = session.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=end,
            eos_token_id=stop_ids(files.tokenizer, session.model.generation_config),
            streamer=Shown(),
            **how,
        )
    return Written("".join(pieces), output.shape[1] - len(ids))
