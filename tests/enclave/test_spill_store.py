"""Matrices on the enclave's disk: read back as written, or an error that says what happened."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.spill_store import SpillStore
from obfuscatune.errors import ProtectionError, StorageError


def matrix(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(35, dtype=torch.float64).view(5, 7).to(dtype)


def only_file(folder: Path) -> Path:
    return next(path for path in folder.rglob("*.bin"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    spill_store = SpillStore(tmp_path)
    sources = [spill_store.keep(matrix(dtype) * factor) for factor in (1, 2)]
    for factor, source in enumerate(sources, start=1):
        assert torch.equal(source(), matrix(dtype) * factor)
        assert torch.equal(source(), matrix(dtype) * factor)  # as often as the worker loses it


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    SpillStore(tmp_path).keep(matrix())
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


DAMAGE = {
    "one bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "cut short": lambda data: data[:-1],
    "emptied": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_changed_file_is_noticed(tmp_path: Path, damage: object) -> None:
    spill_store = SpillStore(tmp_path)
    source = spill_store.keep(matrix() + 1)
    path = only_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ProtectionError, match="not what was written"):
        source()


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    spill_store = SpillStore(tmp_path)
    source = spill_store.keep(matrix())
    only_file(tmp_path).unlink()
    with pytest.raises(StorageError, match="cannot read the kept matrix"):
        source()


def test_it_is_removed_with_its_last_matrix(tmp_path: Path) -> None:
    source = SpillStore(tmp_path).keep(matrix())
    gc.collect()
    assert torch.equal(source(), matrix())
    del source
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_no_place_for_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="folder for matrices"):
        SpillStore(tmp_path / "absent")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from obfuscatune.enclave.spill_store import SpillStore
from obfuscatune.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
spill_store = SpillStore(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    spill_store.keep(torch.zeros(1000, 1000))
except StorageError as error:
    print(error)
"""


def test_full_disk(tmp_path: Path) -> None:
    """A process that may write no file over 100 kB stands for a full disk: write() fails half-way just so."""
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "cannot keep a matrix" in run.stdout
    assert "File too large; point TMPDIR to a disk with room" in run.stdout
