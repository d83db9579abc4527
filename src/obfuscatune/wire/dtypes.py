"""The four element types that may cross the wire."""

from enum import IntEnum

import torch

from obfuscatune.wire.errors import ConfigError


class DType(IntEnum):
    """Code of an element type in a header. NONE stands in messages that carry no matrix."""

    NONE = 0
    FLOAT64 = 1
    FLOAT32 = 2
    BFLOAT16 = 3
    FLOAT16 = 4

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same type as torch names it. KeyError for NONE, which is no type."""
        return _TORCH[self]

    @classmethod
    def of(cls, dtype: torch.dtype) -> "DType":
        """The code of a torch dtype.

        Raises:
            ConfigError: it is not one of the four.
        """
        try:
            return _CODE[dtype]
        except KeyError:
            known = ", ".join(str(t).removeprefix("torch.") for t in _CODE)
            raise ConfigError(f"the wire carries {known}; {dtype} came: convert it first") from None


ITEMSIZE = {DType.NONE: 0, DType.FLOAT64: 8, DType.FLOAT32: 4, DType.BFLOAT16: 2, DType.FLOAT16: 2}
"""Bytes of one element."""
_TORCH = {
    DType.FLOAT64: torch.float64,
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}
_CODE = {dtype: code for code, dtype in _TORCH.items()}
