"""The enclave's end of shared memory: no two matrices in one place, and every place comes back."""

from __future__ import annotations

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.enclave.client.allocator import Allocator
from obfuscatune.protocol.shared_memory import ALIGNMENT, SharedMemory

SIZE = 16384


def allocator() -> Allocator:
    memory, descriptor = SharedMemory.create(SIZE)
    os.close(descriptor)
    return Allocator(memory)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.integers(1, 900), st.integers(-20, -1)), max_size=60))
def test_what_is_lent_never_overlaps_and_comes_back(steps: list[int]) -> None:
    """A positive step borrows so many elements, a negative one returns one of those that are out."""
    lender = allocator()
    out: list[tuple[torch.Tensor, int]] = []
    for number, step in enumerate(steps):
        if step < 0 and out:
            out.pop(step % len(out))
        elif step > 0:
            out += [
                (allocated, number) for allocated in [lender.allocate(1, step, torch.float32)] if allocated is not None
            ]
            if out and out[-1][1] == number:
                assert (lender.offset_of(out[-1][0].fill_(number)) or 0) % ALIGNMENT == 0
        assert all((allocated == mark).all() for allocated, mark in out)
    out.clear()
    assert lender.allocate(1, SIZE // 4, torch.float32) is not None


def test_what_does_not_fit_is_not_lent() -> None:
    lender = allocator()
    assert lender.allocate(1, SIZE + 1, torch.uint8) is None
    whole = lender.allocate(1, SIZE, torch.uint8)
    assert whole is not None
    assert lender.allocate(1, 1, torch.uint8) is None
    view = whole[:, 5:]
    del whole
    assert lender.allocate(1, 1, torch.uint8) is None  # a view of it is still out
    del view
    assert lender.allocate(1, 1, torch.uint8) is not None


def test_other_memory_has_no_offset() -> None:
    lender = allocator()
    assert lender.offset_of(torch.zeros(4)) is None
    matrix = lender.allocate(2, 64, torch.float32)
    assert matrix is not None
    assert lender.offset_of(matrix) == 0
    assert lender.offset_of(matrix[1]) is None
