"""Keys and values of several sequences in one buffer, for a model of transformers.

Sequences end in the same column, wherever they began; a step writes one column for all:

    column      0         start                 end      room
    sequence 0  .  .  .  .  .  .  .  k  k  k  k  |  .  .  .
    sequence 1  .  .  .  .  k  k  k  k  k  k  k  |  .  .  .
                                     first of sequence 0 is 7, of sequence 1 is 4

What is before a sequence's first column is padding: zeros, and masked. transformers' own cache is concatenated anew for
each token and layer; here a step writes in place, and buffers are copied when they are full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from obfuscatune.errors import ConfigError

SLACK = 64
"""Columns beyond the longest sequence: as many tokens lie between two moves of a buffer at the least."""


def cells(rows: int, longest: int) -> int:
    """Places for a token that a cache has at the most for so many sequences, none of them longer than `longest`."""
    return _row_capacity(rows) * (longest + SLACK)


def bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Memory for the keys and values of one token."""
    text: Any = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    return 2 * int(text.num_hidden_layers) * int(key_heads) * int(head_dim) * dtype.itemsize


class _Columns:
    """Where the sequences of a cache lie; one for all its layers."""

    def __init__(self) -> None:
        self.first: list[int] = []
        """The first column of each sequence."""
        self.longest: list[int] = []
        """The most tokens that each sequence will have."""
        self.start = self.end = 0
        self.rows = self.room = 0
        """Capacity of the buffers."""


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not checked; its class is Any
    """Of one layer of the model: keys and values, (rows, heads, room, head_dim) each."""

    def __init__(self, columns: _Columns, window: int | None) -> None:
        super().__init__()
        self._columns = columns
        self._window = window
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, like the states that come first."""
        self.keys, self.values = (self._zeros(states) for states in (key_states, value_states))
        self.is_initialized = True

    def _zeros(self, like: Tensor) -> Tensor:
        # Zeros, since padding is multiplied by 0 and must not be infinite.
        return like.new_zeros(self._columns.rows, like.shape[1], self._columns.room, like.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of the columns after `end`; return all that the queries of these may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        columns = self._columns
        rows, end = len(columns.first), columns.end + key_states.shape[-2]
        self.keys[:rows, :, columns.end : end] = key_states
        self.values[:rows, :, columns.end : end] = value_states
        begin = columns.start + self._hidden()
        return self.keys[:rows, :, begin:end], self.values[:rows, :, begin:end]

    def _hidden(self) -> int:
        """Columns that have left the window of a sliding layer."""
        return 0 if self._window is None else max(0, self.get_seq_length() - self._window + 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns that `update` will return, and how many come before them."""
        return self.get_seq_length() + query_length - self._hidden(), self._hidden()

    def get_seq_length(self) -> int:
        """Columns that are written."""
        return self._columns.end - self._columns.start

    def get_max_length(self) -> int:
        """-1: buffers grow."""
        return -1

    def move(self, begin: int, like: _Layer, old: slice) -> None:
        """Have buffers of the present capacity, zero but for columns `old`, which lie from `begin` on now."""
        rows, to = len(self._columns.first), slice(begin, begin + old.stop - old.start)
        source = self if self.is_initialized else like
        keys, values = self._zeros(source.keys), self._zeros(source.values)
        if self.is_initialized:
            keys[:rows, :, to] = self.keys[:rows, :, old]
            values[:rows, :, to] = self.values[:rows, :, old]
        self.keys, self.values, self.is_initialized = keys, values, True

    def take(self, row: int, source: _Layer, source_row: int, first: int) -> None:
        """Copy a sequence of another cache, or of this one, so that it ends where the sequences here end."""
        end, source_end = self._columns.end, source._columns.end
        there = slice(source_end - (end - first), source_end)
        self.keys[row, :, first:end] = source.keys[source_row, :, there]
        self.values[row, :, first:end] = source.values[source_row, :, there]

    def clear(self, row: int) -> None:
        """Zero one row."""
        self.keys[row].zero_()
        self.values[row].zero_()


class BatchCache(Cache):  # type: ignore[misc]  # transformers is not checked; its class is Any
    """A cache of sequences that come and go.

    For each forward pass: `reserve`, the pass with `attention_mask` and `position_ids`, `advance`. A pass that failed
    leaves no trace, where `advance` is not called.
    """

    def __init__(self, config: PretrainedConfig, device: torch.device | str = "cpu") -> None:
        """
        Raises:
            ConfigError: a layer of the model keeps something else than keys and values of each token.
        """
        self._columns = columns = _Columns()
        self._device = device
        layers = []
        for layer in DynamicCache(config=config).layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or _is_chunked(config):
                raise ConfigError(
                    f"{config.model_type} cannot be served: its cache has layers of another kind than full or sliding "
                    "attention"
                )
            layers.append(_Layer(columns, getattr(layer, "sliding_window", None)))
        super().__init__(layers=layers)

    @property
    def rows(self) -> int:
        """Sequences that it holds."""
        return len(self._columns.first)

    @property
    def cells(self) -> int:
        """Places for a token that are allocated."""
        return self._columns.rows * self._columns.room

    def begin(self, lengths: Sequence[int], width: int) -> None:
        """Take sequences whose tokens follow, in `width` columns that are filled on the left.

        Args:
            lengths: tokens of each.
            width: at least the largest of them.
        """
        columns = self._columns
        columns.first = [width - length for length in lengths]
        columns.longest = [width] * len(lengths)
        columns.rows, columns.room = len(lengths), width

    def reserve(self, tokens: int) -> None:
        """See that the next forward pass finds room for so many tokens of each sequence."""
        columns = self._columns
        if columns.end + tokens > columns.room:
            self._move(self.rows, columns.end - columns.start + tokens, columns.end - columns.start)

    def advance(self, tokens: int) -> None:
        """The tokens of a forward pass are written."""
        self._columns.end += tokens

    def attention_mask(self, tokens: int) -> Tensor:
        """(rows, columns): 1 where a sequence has a token, for a forward pass of so many tokens."""
        columns = self._columns
        return (torch.arange(columns.start, columns.end + tokens, device=self._device) >= self._first()).long()

    def position_ids(self, tokens: int) -> Tensor:
        """(rows, tokens): the place of each token in its own sequence."""
        columns = self._columns
        positions = torch.arange(columns.end, columns.end + tokens, device=self._device) - self._first()
        return positions.clamp(min=0)

    def _first(self) -> Tensor:
        return torch.tensor(self._columns.first, device=self._device)[:, None]

    def join(self, other: BatchCache, rows: Sequence[int], longest: Sequence[int]) -> None:
        """Copy sequences of another cache behind those that are here.

        Args:
            other: a cache of the same model.
            rows: which of its sequences.
            longest: the most tokens that each of them will have.
        """
        columns, there = self._columns, other._columns
        lengths = [there.end - there.first[row] for row in rows]
        before, width = self.rows, max(columns.end - columns.start, *lengths)
        columns.longest += longest
        if before + len(rows) > columns.rows or width > columns.end or not before:
            self._move(before + len(rows), width, width, other)
        for row, length in zip(rows, lengths, strict=True):
            first = columns.end - length
            columns.first.append(first)
            for layer, source in zip(self.layers, other.layers, strict=True):
                layer.take(self.rows - 1, source, row, first)
        columns.start = min(columns.first)

    def remove(self, row: int) -> None:
        """Forget a sequence; the last one takes its row. Nothing of it stays in memory that others read."""
        columns, last = self._columns, self.rows - 1
        for layer in self.layers:
            layer.clear(row)
            if row != last:
                layer.take(row, layer, last, columns.first[last])
                layer.clear(last)
        for values in (columns.first, columns.longest):
            values[row] = values[last]
            values.pop()
        columns.start = min(columns.first, default=columns.end)
        if 4 * _row_capacity(self.rows) <= columns.rows:
            self._move(self.rows, columns.end - columns.start, columns.end - columns.start)

    def _move(self, rows: int, width: int, end: int, like: BatchCache | None = None) -> None:
        """New buffers for so many rows and more than `width` columns; what is here ends at column `end` of them."""
        columns = self._columns
        shift, old = end - columns.end, slice(columns.start, columns.end)
        columns.rows = _row_capacity(rows)
        columns.room = max(width, min(max(columns.longest, default=0), width + width // 2)) + SLACK
        for layer, source in zip(self.layers, (like or self).layers, strict=True):
            if layer.is_initialized or source.is_initialized:
                layer.move(old.start + shift, source, old)
        columns.first = [first + shift for first in columns.first]
        columns.start, columns.end = columns.start + shift, end


def _row_capacity(rows: int) -> int:
    """The next power of two: sequences that join one after another do not each move the buffers."""
    return 1 << max(0, rows - 1).bit_length()


def _is_chunked(config: PretrainedConfig) -> bool:
    text: Any = config.get_text_config(decoder=True)
    return getattr(text, "attention_chunk_size", None) is not None
