"""A tensor's bytes are its own memory; one NaN among a million elements is found."""

import hashlib
import struct

import pytest
import torch

from obfuscatune.errors import ConfigError
from obfuscatune.protocol.tensors import DType, bytes_of, content_digest, is_finite

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_the_memory_itself(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 5, dtype=dtype)
    view = bytes_of(tensor)
    assert len(view) == 15 * DType.of(dtype).itemsize == tensor.nbytes
    view[:] = bytes_of(torch.ones(3, 5, dtype=dtype))
    assert torch.equal(tensor, torch.ones(3, 5, dtype=dtype))


def test_elements_are_little_endian_and_row_major() -> None:
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert bytes(bytes_of(tensor)) == struct.pack("<4f", 1, 2, 3, 4)


def test_only_contiguous_tensors() -> None:
    with pytest.raises(ConfigError):
        bytes_of(torch.zeros(3, 5).t())


def test_every_dtype_has_a_code_and_back() -> None:
    assert [DType.of(dtype).torch_dtype for dtype in DTYPES] == DTYPES
    with pytest.raises(ConfigError):
        DType.of(torch.int64)


def test_digest_covers_dtype_shape_and_elements() -> None:
    tensor = torch.tensor([[1.0, 2.0]])
    packed = struct.pack("<BII2f", 2, 1, 2, 1.0, 2.0)
    assert content_digest(tensor) == hashlib.sha256(packed).digest()
    others = [tensor.t().contiguous(), tensor.double(), tensor + 1]
    assert len({content_digest(other) for other in [tensor, *others]}) == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_is_found(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.ones(500, 70, dtype=dtype)
    assert is_finite(tensor)
    tensor[499, 69] = bad
    assert not is_finite(tensor)


def test_opposite_infinities_do_not_hide_each_other() -> None:
    assert not is_finite(torch.tensor([[float("inf"), float("-inf")]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_elements_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((4, 1000), torch.finfo(dtype).max, dtype=dtype))
