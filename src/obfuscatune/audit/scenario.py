"""The inputs of an audited run: a secret model, its public base, private text, and public text of the same kind.

text  ->  windows of `Size.length` tokens  ->  private half: the run's examples and prompts
                                           ->  public half: known to attackers
base  ->  all weights tuned on private windows  ->  secret model

Attackers know the architecture: they can build a model of the same configuration, with weights of their own.
"""

from __future__ import annotations

import copy
import hashlib
import lzma
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from obfuscatune.assets import clinic_notes_path
from obfuscatune.audit.attacks.knowledge import Architecture
from obfuscatune.enclave.target_layers import find_groups
from obfuscatune.errors import DataError
from obfuscatune.training.data import Source
from obfuscatune.training.data_files import Completion, Conversation, Record, Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Logits(nn.Module):
    """A language model in float32, without cache and dropout: token ids (n, length) -> logits (n, length, V)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.float().eval()

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (n, length), int64 -> logits (n, length, V), float32."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


@lru_cache(maxsize=8)
def architecture(base: PreTrainedModel, first_blocks: int) -> Architecture:
    """How to build a model like `base`, and where the weights of the groups after `first_blocks` belong in it."""
    groups = find_groups(base, first_blocks)

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Logits(AutoModelForCausalLM.from_config(base.config, trust_remote_code=False))

    def place(weights: Sequence[Tensor]) -> dict[str, Tensor]:
        placed: dict[str, Any] = {}
        for group, W in zip(groups, weights, strict=True):
            for target, part in zip(group.targets, W.split(list(group.widths), dim=1), strict=True):
                placed[f"model.{target.path}.weight"] = part if isinstance(target.layer, Conv1D) else part.T
        return placed

    return Architecture(build, lambda: Logits(copy.deepcopy(base)), place)


LARGEST_TEXT = 4_000_000
"""Bytes that are read of a file; the rest is ignored."""
MOST_PRIVATE = 2000
"""Windows of private text; more add nothing to an audit."""


@dataclass(frozen=True)
class Size:
    """How large an audited run is.

    Attributes:
        length: tokens of a window, and so of a training example.
        examples: training examples; each is used once per epoch.
        epochs: epochs of LoRA fine-tuning, with one example per step.
        prompts: prompts for generation, in families of three that share their first half.
        prompt: tokens of a prompt.
        new_tokens: tokens that are generated for each prompt.
        tuning_steps: optimizer steps from the public base to the secret model.
        public: windows of public text.
        held_out: private windows that the secret model is not tuned on; at most a quarter of them.
    """

    length: int = 32
    examples: int = 12
    epochs: int = 2
    prompts: int = 12
    prompt: int = 16
    new_tokens: int = 17
    tuning_steps: int = 40
    public: int = 400
    held_out: int = 100

    @classmethod
    def with_tokens_per_call(cls, tokens: int) -> Size:
        """As many texts of other lengths: `tokens` in an example, half in a prompt; no more public tokens in all."""
        usual = cls()
        fewer = min(1.0, usual.length / tokens)
        return cls(
            length=tokens,
            prompt=tokens // 2,
            public=round(usual.public * fewer),
            held_out=max(24, round(usual.held_out * fewer)),
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the model reads."""
        return max(self.length, self.prompt + self.new_tokens)


@dataclass(frozen=True, eq=False)
class Scenario:
    """The inputs of a run. Each text is a window of `size.length` token ids.

    Attributes:
        directory: the secret model's files.
        base: the public base, float32.
        secret: the secret model, float32.
        private: all private windows; the `held_out` ones are their end.
        drift: relative distance of the secret weights from the public ones, |secret - base| / |base|.
    """

    name: str
    directory: Path
    base: PreTrainedModel
    secret: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    private: tuple[tuple[int, ...], ...]
    public: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    size: Size
    drift: float

    def examples(self, seed: int) -> list[tuple[int, ...]]:
        """The training examples for one seed."""
        return _drawn(self.private, f"examples/{seed}", self.size.examples)

    def prompts(self, seed: int) -> list[tuple[int, ...]]:
        """The prompts for one seed: families of three that share their first half."""
        size, half = self.size, self.size.prompt // 2
        texts = _drawn(self.private, f"prompts/{seed}", size.prompts + size.prompts // 3 + 1)
        beginnings, own = texts[size.prompts :], texts[: size.prompts]
        return [beginnings[number // 3][:half] + text[half : size.prompt] for number, text in enumerate(own)]


def make_scenario(
    name: str,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    folder: Path,
    size: Size = Size(),
    *,
    step_done: Callable[[], None] = lambda: None,
) -> Scenario:
    """Split the text, tune the base on the private half, and write the secret model to `folder`.

    Args:
        step_done: called after each of the `size.tuning_steps` steps.

    Raises:
        DataError: the text is too short for `size`.
    """
    windows = _windows(text, tokenizer, size.length)
    needed = size.examples + size.prompts + size.prompts // 3 + 1
    if len(windows) < 2 * needed:
        raise DataError(
            f"an audit needs text of at least {2 * needed * size.length} tokens, this has "
            f"{len(windows) * size.length}: give more text, or ask for fewer --tokens-per-call"
        )
    shuffled = _drawn(tuple(windows), "split", len(windows))
    private = tuple(shuffled[: max(needed, len(windows) // 2)][:MOST_PRIVATE])
    public = tuple(shuffled[len(private) :][: size.public])
    base = base.float().eval()
    held_out = private[-min(size.held_out, len(private) // 4) :]
    secret = _tuned(base, private[: -len(held_out)], size.tuning_steps, step_done)
    secret.save_pretrained(folder)
    drift = _relative_distance(secret, base)
    return Scenario(name, folder, base, secret, tokenizer, private, public, held_out, size, drift)


def read_text(path: Path | None) -> str:
    """The text to audit on: the records of a .jsonl file, or a UTF-8 text file, also .xz; the embedded notes if None.

    Raises:
        DataError: the file cannot be read.
    """
    path = path or clinic_notes_path() / "train.jsonl"
    if path.suffix == ".jsonl":
        return "\n".join(_record_text(record) for _, record in Source.of(path, None, "train").records())
    try:
        with path.open("rb") as file, lzma.open(file) if path.suffix == ".xz" else nullcontext(file) as plain:
            return plain.read(LARGEST_TEXT).decode("utf-8-sig", "ignore")  # the last character may be cut in two
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error


def _record_text(record: Record) -> str:
    match record:
        case Text(text):
            return text
        case Completion(prompt, completion):
            return f"{prompt} {completion}"
        case Conversation(messages):
            return " ".join(message.content for message in messages)


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[tuple[int, ...]]:
    """The token ids of the text in windows of `length`; an incomplete last window is left out."""
    ids: list[int] = []
    for start in range(0, len(text), 10_000):  # tokenizers slow down on one long line
        ids += tokenizer(text[start : start + 10_000], add_special_tokens=False, verbose=False)["input_ids"]
    return [tuple(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]


def _drawn(texts: tuple[tuple[int, ...], ...], label: str, count: int) -> list[tuple[int, ...]]:
    """`count` of the texts without repetition, drawn by a hash of the label: the same on every machine."""
    order = sorted(range(len(texts)), key=lambda index: hashlib.sha256(f"audit/{label}/{index}".encode()).digest())
    return [texts[index] for index in order[:count]]


def _relative_distance(model: nn.Module, other: nn.Module) -> float:
    """|model - other| / |other| over all parameters, in the Euclidean norm."""
    with torch.no_grad():
        pairs = list(zip(model.parameters(), other.parameters(), strict=True))
        moved = sum(float((a - b).square().sum()) for a, b in pairs)
        return math.sqrt(moved / sum(float(b.square().sum()) for _, b in pairs))


def _tuned(
    base: PreTrainedModel, texts: tuple[tuple[int, ...], ...], steps: int, step_done: Callable[[], None]
) -> PreTrainedModel:
    """A copy of the base after `steps` steps of AdamW on all weights, with eight texts per step."""
    model = copy.deepcopy(base).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(steps):
            batch = torch.tensor(_drawn(texts, f"training/{step}", 8))
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step_done()
    return model.eval()
