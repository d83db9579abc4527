"""What an audited run works on: a secret model, its public base, private text, and public text of the same kind.

text file  ->  windows of equal length  ->  private ones: trained on, prompted with;  public ones: the attacker's
base       ->  tuned as a whole on private text  ->  the secret model

An attacker knows how the audited model is built: its configuration, with weights of its own.
"""

from __future__ import annotations

import copy
import hashlib
import lzma
from collections.abc import Sequence
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
    """Token numbers (n, length) -> logits (n, length, V)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.float().eval()

    def forward(self, ids: Tensor) -> Tensor:
        """Without a cache, without dropout."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


@lru_cache(maxsize=8)
def architecture(base: PreTrainedModel, first_blocks: int) -> Architecture:
    """That of a model, and where the layers behind the first blocks have their weights in it."""
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
"""Bytes that are read of a file."""


@dataclass(frozen=True)
class Size:
    """How much is run; every count in tokens, texts or steps.

    Attributes:
        length: tokens of a training example.
        examples: training examples; each is seen in every epoch.
        epochs: of LoRA fine-tuning, one example a step.
        prompts: prompts that are continued; every three in a row begin alike.
        prompt: tokens of a prompt; the first half is what it shares.
        new_tokens: that are generated for each.
        tuning_steps: by which the secret model is away from its public base.
        public: windows of public text.
        held_out: windows of private text that are kept from the tuning, at most a quarter.
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
    """Everything a run needs. Texts are windows of `size.length` token numbers."""

    name: str
    directory: Path
    """Of the secret model."""
    base: PreTrainedModel
    """The public one."""
    secret: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    private: tuple[tuple[int, ...], ...]
    public: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    """Of the private ones those that the secret model was not tuned on."""
    size: Size
    drift: float
    """How far the secret model is from its base: the norm of all differences over that of all weights."""

    def examples(self, seed: int) -> list[tuple[int, ...]]:
        """Training examples of a seed."""
        return _drawn(self.private, f"examples/{seed}", self.size.examples)

    def prompts(self, seed: int) -> list[tuple[int, ...]]:
        """Prompts of a seed: families of three with one beginning."""
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
) -> Scenario:
    """Split the text, tune the base on the private part of it, and write the secret model to `folder`.

    Raises:
        DataError: there is too little text.
    """
    windows = _windows(text, tokenizer, size.length)
    needed = size.examples + size.prompts + size.prompts // 3 + 1
    if len(windows) < 2 * needed:
        raise DataError(
            f"an audit needs text of at least {2 * needed * size.length} tokens, this has "
            f"{len(windows) * size.length}: give more text, or ask for fewer --tokens-per-call"
        )
    shuffled = _drawn(tuple(windows), "split", len(windows))
    private = tuple(shuffled[: max(needed, len(windows) // 2)][:2000])
    public = tuple(shuffled[len(private) :][: size.public])
    base = base.float().eval()
    held_out = private[-min(size.held_out, len(private) // 4) :]
    secret = _tuned(base, private[: -len(held_out)], size.tuning_steps)
    with torch.no_grad():
        pairs = list(zip(secret.parameters(), base.parameters(), strict=True))
        moved = sum(float((a - b).square().sum()) for a, b in pairs)
        drift = (moved / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5
    secret.save_pretrained(folder)
    return Scenario(name, folder, base, secret, tokenizer, private, public, held_out, size, drift)


def read_text(path: Path | None) -> str:
    """Text of a file: .jsonl records, .xz, or anything else as UTF-8 text; the embedded notes if None.

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
    ids: list[int] = []
    for start in range(0, len(text), 10_000):  # tokenizers slow down on one long line
        ids += tokenizer(text[start : start + 10_000], add_special_tokens=False, verbose=False)["input_ids"]
    return [tuple(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]


def _drawn(texts: tuple[tuple[int, ...], ...], label: str, count: int) -> list[tuple[int, ...]]:
    """`count` of the texts in an order that depends on the label alone."""
    order = sorted(range(len(texts)), key=lambda index: hashlib.sha256(f"audit/{label}/{index}".encode()).digest())
    return [texts[index] for index in order[:count]]


def _tuned(base: PreTrainedModel, texts: tuple[tuple[int, ...], ...], steps: int) -> PreTrainedModel:
    """A copy of the base after that many steps of AdamW on all weights, eight texts each."""
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
    return model.eval()
