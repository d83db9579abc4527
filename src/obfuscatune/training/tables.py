"""Tables to numbered records: CSV and TSV, Parquet, and directories that `datasets` saved.

CSV is read by Python itself: every cell is text as it stands, "007" and "NA" too, and nothing is guessed. Parquet and
saved data sets need the extra `data`. Nothing is written to a cache.
"""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from obfuscatune.errors import ConfigError, DataError
from obfuscatune.training.data_files import MAX_LINE_BYTES, Line, opened

_ROWS_AT_A_TIME = 1024
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")


def read_csv(path: Path, delimiter: str) -> Iterator[Line]:
    """Yield the rows of a CSV file with a header, each with the line that it begins on. Empty lines are passed over.

    Raises:
        DataError: it cannot be read; not UTF-8; a column without a name, or two of one name; a row of more or
            fewer cells than the header; an unclosed quote; a cell over `MAX_LINE_BYTES`; no row.
    """
    found = False
    with opened(path) as file, _cells_up_to(MAX_LINE_BYTES):
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        begins = 1
        try:
            for cells in reader:
                where, begins = f"{path}:{begins}", reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = _checked_header(where, cells)
                    continue
                if len(cells) != len(header):
                    raise DataError(f"{where}: {len(cells)} cells, and the header has {len(header)}")
                found = True
                yield Line(where, dict(zip(header, cells, strict=True)))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not UTF-8 in this line or after it") from error
        except csv.Error as error:
            raise DataError(f"{path}:{begins}: malformed CSV: {error}") from error
    if not found:
        raise DataError(f"{path}: the file holds no record; expected a header with the fields' names, and rows")


def read_parquet(path: Path) -> Iterator[Line]:
    """Yield the rows of a Parquet file, numbered from 1. Nulls are left out, in nested values too.

    Raises:
        DataError: it cannot be read.
        ConfigError: the extra `data` is not installed.
    """
    _need_datasets(path)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with opened(path) as file:
        try:
            batches = ParquetFile(file).iter_batches(batch_size=_ROWS_AT_A_TIME)
            yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))
        except ArrowException as error:
            raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory is one that `datasets.Dataset.save_to_disk` made, or `DatasetDict.save_to_disk`."""
    return path.is_dir() and any((path / name).is_file() for name in _SAVED)


def read_saved_dataset(path: Path, split: str) -> Iterator[Line]:
    """Yield the rows of a saved data set, numbered from 1; of several splits in one directory, those of `split`.

    Raises:
        DataError: it cannot be read, or has no such split.
        ConfigError: the extra `data` is not installed.
    """
    _need_datasets(path)
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow raise what they like
        raise DataError(f"{path}: cannot be read as a saved data set: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path}: has no split {split}, only {', '.join(loaded)}; name one: {path / 'SPLIT'}")
        loaded = loaded[split]
    yield from _numbered(path, iter(loaded))


def _numbered(path: Path, rows: Iterator[dict[str, Any]]) -> Iterator[Line]:
    number = 0
    for number, row in enumerate(rows, start=1):
        yield Line(f"{path}:{number}", _without_nulls(row))
    if not number:
        raise DataError(f"{path}: holds no record")


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object in a column the fields of all of them, and null where one has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


@contextmanager
def _cells_up_to(size: int) -> Iterator[None]:
    """Python's csv refuses cells over 128 KiB, by a limit that holds for the whole process: it is put back."""
    before = csv.field_size_limit(size)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _checked_header(where: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not all(names):
        raise DataError(f"{where}: column {names.index('') + 1} of the header has no name")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: the header names {twice} twice")
    return names


def _need_datasets(path: Path) -> None:
    try:
        import datasets  # noqa: F401  it brings pyarrow
    except ImportError as error:
        raise ConfigError(f"{path}: to read it, install the extra `data`: pip install 'obfuscatune[data]'") from error
