"""A file of records to examples that fit the model, with one policy for those that do not."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from obfuscatune.tuning.jsonl import Line, file_digest, read_jsonl
from obfuscatune.tuning.records import Record, parse_record, parse_task_record
from obfuscatune.tuning.tasks import Rows, Task, find_task
from obfuscatune.tuning.tokens import Encoded, encode_record
from obfuscatune.wire.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that Hugging Face losses leave out."""

TooLong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True)
class Example:
    """One sequence: token ids, and labels that are the ids where trained on and `IGNORED` elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts: the model predicts each from the one before, so the first never."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Dataset:
    """Examples in the file's order; how many records were cut or left out; the source's SHA-256."""

    examples: tuple[Example, ...]
    truncated: int
    dropped: int
    digest: str


@dataclass(frozen=True)
class Data:
    """What a run trains on, and what it measures on, if anything."""

    train: Dataset
    eval: Dataset | None


@dataclass(frozen=True)
class Source:
    """A file of training records or, with `task`, of a task's own; of a directory, the rows of `split`."""

    path: Path
    task: Task | None
    split: Literal["train", "test"]

    @classmethod
    def of(cls, path: Path, task: str | None, split: Literal["train", "test"]) -> "Source":
        """With a task, a directory means the rows that the task sets aside for `split` there.

        Raises:
            ConfigError: no such task.
            DataError: a directory, and no task to say which of its files are meant.
        """
        source = cls(path, None if task is None else find_task(task), split)
        if source.task is None and path.is_dir():
            raise DataError(f"{path}: a directory; name a file, or say with --task which question set it holds")
        return source

    def lines(self) -> Iterator[Line]:
        """The records, unparsed."""
        if self.task is not None and self.path.is_dir():
            return self.task.lines(self.path, self._rows(self.task))
        return read_jsonl(self.path)

    def records(self) -> Iterator[tuple[str, Record]]:
        """Where each record stands (`FILE:LINE`), and the record."""
        for line in self.lines():
            yield line.where, parse_record(line) if self.task is None else parse_task_record(self.task, line)

    def digest(self) -> str:
        """SHA-256 over the file's bytes, and which of its rows are meant."""
        if self.task is None or not self.path.is_dir():
            return file_digest(self.path)
        rows = self._rows(self.task)
        digest = file_digest(self.task.file(self.path, rows))
        return hashlib.sha256(f"{digest} {rows.start} {rows.stop}".encode()).hexdigest()

    def _rows(self, task: Task) -> Rows:
        return task.train if self.split == "train" else task.test


def load_dataset(
    source: Source, tokenizer: "PreTrainedTokenizerBase", max_length: int, too_long: TooLong = "error"
) -> Dataset:
    """Read, tokenise and measure every record.

    Args:
        max_length: Tokens; the most that an example may hold, its end-of-sequence token included.
        too_long: What becomes of a longer one: `error` refuses the file, naming the line; `truncate` keeps
            the first `max_length` tokens; `drop` leaves the record out.

    Raises:
        DataError: the file cannot be read; a record that is too long, or that holds nothing to train on
            (once truncated); no record left.
        ConfigError: the tokenizer cannot encode the records.
    """
    examples: list[Example] = []
    truncated = dropped = 0
    for where, encoded in _encode_all(tokenizer, source.records()):
        length = len(encoded.input_ids)
        if length > max_length:
            if too_long == "error":
                raise DataError(
                    f"{where}: {length} tokens, and the most is {max_length}; shorten the record, raise "
                    "--max-length as far as the model's window goes, or choose --too-long truncate or drop"
                )
            if too_long == "drop":
                dropped += 1
                continue
            truncated += 1
        example = _example(encoded, max_length)
        if example.trained_tokens == 0:
            raise DataError(f"{where}: none of the first {max_length} tokens is to be trained on")
        examples.append(example)
    if not examples:
        raise DataError(f"{source.path}: all {dropped} records are longer than {max_length} tokens")
    return Dataset(tuple(examples), truncated, dropped, source.digest())


def _encode_all(
    tokenizer: "PreTrainedTokenizerBase", records: Iterable[tuple[str, Record]]
) -> Iterator[tuple[str, Encoded]]:
    for where, record in records:
        yield where, encode_record(tokenizer, record)


def _example(encoded: Encoded, max_length: int) -> Example:
    pairs = list(zip(encoded.input_ids, encoded.trained, strict=True))[:max_length]
    return Example(tuple(i for i, _ in pairs), tuple(i if trained else IGNORED for i, trained in pairs))
