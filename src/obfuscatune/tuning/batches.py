"""Which examples go into which step, and their tensors. Both are functions of the seed and the step alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from obfuscatune.tuning.data import IGNORED, Example


@dataclass(frozen=True)
class Batch:
    """Examples of one forward pass, padded on the right.

    `input_ids`, `attention_mask` and `labels` are int64 of shape (batch, longest example).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    trained_tokens: int
    """Tokens that the loss counts."""


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Pad examples to the longest among them."""
    length = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids[row, :size] = torch.tensor(example.input_ids)
        mask[row, :size] = 1
        labels[row, :size] = torch.tensor(example.labels)
    trained = sum(example.trained_tokens for example in examples)
    return Batch(ids.to(device), mask.to(device), labels.to(device), trained)


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `range(count)`: each index sorted by a hash of (seed, epoch, index).

    It depends on no random generator, hence on no library's version and no draw made elsewhere.
    """
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest())


@dataclass(frozen=True)
class Plan:
    """The order of a whole run. Steps count from 0.

    A step is one update of the factors, from up to `batch_size * accumulation` examples; the last of an epoch
    may have fewer.
    """

    examples: int
    batch_size: int
    accumulation: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the examples."""
        return -(-self.examples // (self.batch_size * self.accumulation))

    def epoch(self, step: int) -> int:
        """The pass that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def micro_batches(self, step: int) -> list[list[int]]:
        """Indices of the examples of a step, one list for each forward pass."""
        order = epoch_order(self.examples, self.seed, self.epoch(step))
        size = self.batch_size * self.accumulation
        start = step % self.steps_per_epoch * size
        chosen = order[start : start + size]
        return [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]
