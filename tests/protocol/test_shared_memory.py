"""Memory that two sides map: sealed at its size, bounded, and read only where it is."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import pytest
import torch

from obfuscatune.errors import LimitExceeded, MalformedMessage
from obfuscatune.protocol.limits import MAX_SHARED_BYTES
from obfuscatune.protocol.shared_memory import SharedMemory

SIZE = 8192


def made(size: int = SIZE, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def test_both_sides_see_the_same() -> None:
    ours, descriptor = SharedMemory.create(SIZE)
    theirs = SharedMemory.attach(descriptor, SIZE)
    ours.matrix(128, 3, 5, torch.float64).copy_(torch.arange(15.0).view(3, 5))
    assert theirs.matrix(128, 3, 5, torch.float64)[2, 4] == 14
    assert theirs.place(128).nbytes == SIZE - 128
    assert theirs.place(128).matrix(3, 5, torch.float64)[2, 4] == 14


def test_it_cannot_be_cut_short_under_the_other() -> None:
    _, descriptor = SharedMemory.create(SIZE)
    for size in (0, SIZE - 1, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW])
def test_what_could_be_cut_short_is_refused(seals: int) -> None:
    with pytest.raises(MalformedMessage, match="not sealed"):
        SharedMemory.attach(made(seals=seals), SIZE)


@pytest.mark.parametrize("size", [0, 1, SIZE - 4096, SIZE + 1, 2 * SIZE])
def test_another_size_than_announced_is_refused(size: int) -> None:
    with pytest.raises(MalformedMessage, match="announced size"):
        SharedMemory.attach(made(), size)


def test_what_is_no_memory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(SIZE))
    for descriptor in (os.open(file, os.O_RDWR), os.pipe()[0]):
        with pytest.raises(MalformedMessage):
            SharedMemory.attach(descriptor, SIZE)
    with pytest.raises(MalformedMessage, match="no descriptor"):
        SharedMemory.attach(None, SIZE)


def test_more_than_allowed_is_refused() -> None:
    with pytest.raises(LimitExceeded):
        SharedMemory.attach(made(MAX_SHARED_BYTES + 4096), MAX_SHARED_BYTES + 4096)


def test_descriptors_are_closed_whatever_comes_of_it() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for descriptor, size in ((made(), SIZE), (made(seals=0), SIZE), (made(), SIZE + 1)):
        with contextlib.suppress(MalformedMessage):
            SharedMemory.attach(descriptor, size)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("offset", [1, 8, 63, SIZE - 64, SIZE, 2**63])
def test_a_matrix_lies_within(offset: int) -> None:
    memory, descriptor = SharedMemory.create(SIZE)
    os.close(descriptor)
    with pytest.raises(MalformedMessage):
        memory.matrix(offset, 3, 11, torch.float64)


@pytest.mark.parametrize("offset", [1, SIZE, SIZE + 64, 2**63])
def test_a_place_begins_within(offset: int) -> None:
    memory, descriptor = SharedMemory.create(SIZE)
    os.close(descriptor)
    with pytest.raises(MalformedMessage):
        memory.place(offset)
