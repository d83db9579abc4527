"""A file of records to examples that fit the model, with one policy for those that do not."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from obfuscatune.errors import ConfigError, DataError
from obfuscatune.training.data_files import (
    Conversation,
    Line,
    Record,
    file_digest,
    is_json_array,
    read_json_array,
    read_jsonl,
    split_turns,
)
from obfuscatune.training.layouts import Format, check_columns, detect_format, parse_task_record
from obfuscatune.training.tables import is_saved_dataset, read_csv, read_parquet, read_saved_dataset
from obfuscatune.training.tasks import Rows, Task, find_task
from obfuscatune.training.tokens import Encoded, check_ids, encode_record, rewrites_turns

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
    """Examples in the file's order, and what became of its records."""

    examples: tuple[Example, ...]
    truncated: int
    """Records that were cut."""
    dropped: int
    """Records that were left out."""
    digest: str
    """SHA-256 of the source."""
    read_as: str
    """One line: the file, its layout, and the columns that were left out."""


@dataclass(frozen=True)
class Data:
    """What a run trains on, and what it measures on, if anything."""

    train: Dataset
    eval: Dataset | None


@dataclass(frozen=True)
class Source:
    """Records to train on or to measure on.

    The path is a file in JSON Lines, JSON, CSV, TSV or Parquet, or a directory that `datasets` saved. With `task`, it
    is a file of a task's own records, or the data directory that holds it: then the rows of `split` are meant.
    `columns` says which column holds a field, where the column has another name.
    """

    path: Path
    task: Task | None
    split: Literal["train", "test"]
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, path: Path, task: str | None, split: Literal["train", "test"], columns: Mapping[str, str] | None = None
    ) -> "Source":
        """With a task, a directory means the rows that the task sets aside for `split` there.

        Raises:
            ConfigError: no such task; columns are named for a task's own records, or for no known field.
            DataError: a directory that `datasets` did not save, and no task to say which of its files are meant.
        """
        source = cls(path, None if task is None else find_task(task), split, columns or {})
        if source.task is not None and source.columns:
            raise ConfigError("--fields maps the names of your own records; those of a --task have theirs")
        check_columns(source.columns)
        if source.task is None and path.is_dir() and not is_saved_dataset(path):
            raise DataError(f"{path}: a directory; name a file, or say with --task which question set it holds")
        return source

    def lines(self) -> Iterator[Line]:
        """The records, unparsed."""
        if self.task is not None and self.path.is_dir():
            return self.task.lines(self.path, self._rows(self.task))
        if self.path.is_dir():
            return read_saved_dataset(self.path, self.split)
        match self.path.suffix.lower():
            case ".parquet":
                return read_parquet(self.path)
            case ".csv":
                return read_csv(self.path, ",")
            case ".tsv":
                return read_csv(self.path, "\t")
            case _:
                return read_json_array(self.path) if is_json_array(self.path) else read_jsonl(self.path)

    def records(self) -> "Records":
        """The records in order, each with where it stands."""
        return Records(self)

    def digest(self) -> str:
        """SHA-256 over the file's bytes, and which of its rows are meant."""
        if not self.path.is_dir():
            return file_digest(self.path)
        total = hashlib.sha256()
        if self.task is None:
            for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
                total.update(f"{file.relative_to(self.path)} {file_digest(file)} ".encode(errors="surrogateescape"))
            return total.hexdigest()
        rows = self._rows(self.task)
        digest = file_digest(self.task.file(self.path, rows))
        return hashlib.sha256(f"{digest} {rows.start} {rows.stop}".encode()).hexdigest()

    def _rows(self, task: Task) -> Rows:
        return task.train if self.split == "train" else task.test


class Records:
    """Iterates over a source's records; knows, while it goes on, their layout and the columns that were left out."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._format: Format | None = None
        self._ignored: set[str] = set()

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        """Where each record stands (`FILE:LINE`), and the record.

        Raises:
            DataError: the file cannot be read, or a record cannot.
        """
        task, columns = self._source.task, self._source.columns
        for line in self._source.lines():
            if task is not None:
                yield line.where, parse_task_record(task, line)
                continue
            if self._format is None:
                self._format = detect_format(line, columns)
            record = self._format.read(line)
            self._ignored |= self._format.ignored(line)
            yield line.where, record

    @property
    def read_as(self) -> str:
        """One line: the file, its layout, and the columns that were left out."""
        if self._source.task is not None or self._format is None:
            return f"{self._source.path}: records of {self._source.task.name if self._source.task else 'no layout'}"
        ignored = f"; not used: {', '.join(sorted(self._ignored))}" if self._ignored else ""
        return f"{self._source.path}: {self._format.layout.name}{ignored}"


def load_dataset(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    too_long: TooLong = "error",
    *,
    split: bool = False,
    vocabulary: int | None = None,
) -> Dataset:
    """Read, tokenise and measure every record.

    Args:
        max_length: Tokens; the most that an example may hold, its end-of-sequence token included.
        too_long: What becomes of a longer one: `error` refuses the file, naming the line; `truncate` keeps
            the first `max_length` tokens; `drop` leaves the record out.
        split: Make an example of each turn, where the chat template rewrites earlier turns.
        vocabulary: Rows of the model's embedding, which every token must be one of; not checked if None.

    Raises:
        DataError: the file cannot be read; a record that is too long, that has a token outside the embedding, or
            that holds nothing to train on (once truncated); no record left.
        ConfigError: the tokenizer cannot encode the records.
    """
    examples: list[Example] = []
    truncated = dropped = 0
    records = source.records()
    for where, encoded in encode_all(tokenizer, records, split=split, vocabulary=vocabulary):
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
        example = _example(encoded.first(max_length))
        if example.trained_tokens == 0:
            raise DataError(f"{where}: none of the first {max_length} tokens is to be trained on")
        examples.append(example)
    if not examples:
        raise DataError(f"{source.path}: all {dropped} records are longer than {max_length} tokens")
    return Dataset(tuple(examples), truncated, dropped, source.digest(), records.read_as)


def encode_all(
    tokenizer: "PreTrainedTokenizerBase",
    records: Iterable[tuple[str, Record]],
    *,
    split: bool = False,
    vocabulary: int | None = None,
) -> Iterator[tuple[str, Encoded]]:
    """Tokenise records; arguments as for `load_dataset`.

    Raises:
        DataError: a record cannot be encoded, or has a token outside the embedding; it names file and line.
        ConfigError: the tokenizer can encode none.
    """
    for where, record in records:
        try:
            for one in _turns(tokenizer, record) if split else (record,):
                encoded = encode_record(tokenizer, one)
                check_ids(tokenizer, encoded.input_ids, vocabulary)
                yield where, encoded
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


def _turns(tokenizer: "PreTrainedTokenizerBase", record: Record) -> Iterable[Record]:
    if isinstance(record, Conversation) and rewrites_turns(tokenizer, record):
        return split_turns(record)
    return (record,)


def _example(encoded: Encoded) -> Example:
    pairs = zip(encoded.input_ids, encoded.trained, strict=True)
    return Example(encoded.input_ids, tuple(i if trained else IGNORED for i, trained in pairs))
