"""One file for each measurement that is done, under a name made of its settings: what is there is not done again.

<out>/cells/<kind>-<name>-<digest of the settings>.json    settings, result, seconds, environment
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from obfuscatune.errors import StorageError
from obfuscatune.report.page import environment
from obfuscatune.training.storage import RunDirectory

_FOLDER = "cells"
_DIGEST_LETTERS = 16


class Meter(Protocol):
    """Progress within a cell."""

    def expect(self, total: int) -> None:
        """Say how many units there are in all."""

    def advance(self, done: int, note: str = "") -> None:
        """Count units done since the last call, with a note to show beside them."""


Watch = Callable[[str], AbstractContextManager[Meter]]
"""Called with what is begun; the meter is for as long as the `with` lasts."""


@dataclass(frozen=True)
class Cell:
    """One measurement: a kind, a name for people, and everything that its result depends on."""

    kind: str
    name: str
    settings: Mapping[str, Any]
    measure: Callable[[Watch], Mapping[str, Any]] = field(repr=False, compare=False)
    """Does it; the result must go into JSON."""

    @property
    def key(self) -> str:
        """A file name: two cells have the same one where all their settings are the same."""
        canonical = json.dumps([self.kind, self.settings], sort_keys=True, ensure_ascii=True)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:_DIGEST_LETTERS]
        return f"{self.kind}-{re.sub('[^A-Za-z0-9.]+', '-', self.name).strip('-')}-{digest}"


@dataclass(frozen=True)
class Measured:
    """A cell that is done."""

    kind: str
    name: str
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    seconds: float
    environment: Mapping[str, str]

    @property
    def subject(self) -> str:
        """The model that an error was measured on: the cell's name without the method's."""
        return self.name.removesuffix(f" {self.settings['method']}")


class CellStore:
    """The cells under one folder."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def read(self, cell: Cell) -> Measured | None:
        """That cell, if it is done.

        Raises:
            StorageError: its file cannot be read, or is not what was written.
        """
        name = _file_of(cell)
        path = self._directory.root / name
        if not path.exists():
            return None
        try:
            document = json.loads(self._directory.read(name))
            return Measured(**document)
        except (ValueError, TypeError) as error:
            raise StorageError(f"{path}: not a finished cell; remove it to measure anew") from error

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those that are still to be done, in their order."""
        return [cell for cell in cells if self.read(cell) is None]

    def measure(self, cell: Cell, watch: Watch) -> Measured:
        """Do a cell and keep it: whole, or not at all.

        Raises:
            StorageError: the disk refused.
        """
        began = time.perf_counter()
        result = cell.measure(watch)
        seconds = time.perf_counter() - began
        measured = Measured(cell.kind, cell.name, dict(cell.settings), dict(result), seconds, environment())
        self._directory.write_file(_file_of(cell), json.dumps(vars(measured), indent=1).encode() + b"\n")
        return measured


def _file_of(cell: Cell) -> str:
    return f"{_FOLDER}/{cell.key}.json"
