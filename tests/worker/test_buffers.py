"""Buffers of few rows are used again, never by two at a time, and only so many are kept."""

import torch

from obfuscatune.protocol.limits import MAX_IN_FLIGHT
from obfuscatune.worker.buffers import MOST_KINDS, Buffers

FEW = (1, 256, torch.float32)


def test_what_was_given_back_is_lent_again_and_what_was_not_is_not() -> None:
    buffers = Buffers()
    first, second = buffers.allocate(*FEW), buffers.allocate(*FEW)
    assert first.matrix.data_ptr() != second.matrix.data_ptr()
    buffers.give_back(first)
    assert buffers.allocate(*FEW) is first
    assert buffers.allocate(*FEW) is not first
    assert buffers.allocate(256, 1, torch.float32).matrix.shape == (256, 1)


def test_the_bytes_are_those_of_the_matrix() -> None:
    buffer = Buffers().allocate(2, 3, torch.bfloat16)
    buffer.matrix.fill_(1.0)
    buffer.view[:2] = bytes(2)
    assert buffer.matrix.tolist() == [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]


def test_only_so_many_are_kept() -> None:
    buffers = Buffers()
    lent = [buffers.allocate(*FEW) for _ in range(2 * MAX_IN_FLIGHT)]
    for buffer in lent:
        buffers.give_back(buffer)
    assert len(buffers._small[FEW]) == MAX_IN_FLIGHT
    for cols in range(1, 10 * MOST_KINDS):
        buffers.give_back(buffers.allocate(1, cols, torch.float32))
    assert len(buffers._small) <= MOST_KINDS
