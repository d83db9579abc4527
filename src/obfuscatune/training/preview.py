"""What a model will see of the records, and what of it is trained on, before anything is loaded or sent."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from obfuscatune.training.data import Source, encode_all
from obfuscatune.training.tokens import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """Successive tokens as text, all of them trained on or none."""

    text: str
    trained: bool


@dataclass(frozen=True)
class PreviewedExample:
    """One example as the model will see it. Counts are tokens; `left_out` are those beyond the longest length."""

    where: str
    pieces: tuple[Piece, ...]
    tokens: int
    trained: int
    left_out: int


@dataclass
class Preview:
    """Reads all records of a source once: yields the first examples, and counts them all.

    The counts are complete once `examples` has ended. A record that is too long is counted, and the reading goes on.
    """

    source: Source
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    split: bool = False
    vocabulary: int | None = None
    lengths: list[int] = field(default_factory=list)
    """Tokens of every example, before any is cut."""
    trained: int = 0
    """Tokens that the loss counts, of all examples as far as they fit."""
    too_long: list[str] = field(default_factory=list)
    """Where each record stands that does not fit, with its length."""
    untrained: list[str] = field(default_factory=list)
    """Where each record stands of which nothing that fits is trained on."""
    read_as: str = ""
    """One line: the file, its layout, and the columns that were left out."""

    def examples(self, count: int) -> Iterator[PreviewedExample]:
        """The first `count` examples.

        Raises:
            DataError, ConfigError: as `load_dataset`, but for lengths.
        """
        records = self.source.records()
        for where, encoded in encode_all(self.tokenizer, records, split=self.split, vocabulary=self.vocabulary):
            length = len(encoded.input_ids)
            kept = encoded.first(self.max_length)
            self.lengths.append(length)
            self.trained += kept.trained_tokens
            if length > self.max_length:
                self.too_long.append(f"{where} ({length} tokens)")
            if not kept.trained_tokens:
                self.untrained.append(where)
            if len(self.lengths) <= count:
                pieces = tuple(split_text(self.tokenizer, kept))
                left_out = length - len(kept.input_ids)
                yield PreviewedExample(where, pieces, len(kept.input_ids), kept.trained_tokens, left_out)
        self.read_as = records.read_as

    @property
    def median_length(self) -> int:
        """Tokens of the example in the middle."""
        return int(median(self.lengths))


def split_text(tokenizer: "PreTrainedTokenizerBase", encoded: Encoded) -> Iterator[Piece]:
    """The text of an example, special tokens included, cut where it begins or ceases to be trained on."""
    shown = ""
    for end in _run_ends(encoded.trained):
        text = str(tokenizer.decode(encoded.input_ids[:end], clean_up_tokenization_spaces=False))
        yield Piece(text[len(shown) :], encoded.trained[end - 1])
        shown = text


def _run_ends(flags: Sequence[bool]) -> Iterator[int]:
    """Where each run of equal flags ends, exclusively."""
    for index in range(1, len(flags) + 1):
        if index == len(flags) or flags[index] != flags[index - 1]:
            yield index
