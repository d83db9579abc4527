"""From a group's weights to W_star and the transforms that undo it.

weights of q, k, v  ->  W (p, q)  ->  R_in, R_out from the root key  ->  W_star = R_in⁻¹ W R_out
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from obfuscatune.enclave.keys import KEY_BYTES, RootKey
from obfuscatune.enclave.target_layers import ResidualRole
from obfuscatune.enclave.tiles import sum_of_squares, transform_in_place, widened
from obfuscatune.enclave.transforms import Transform, TransformSpec
from obfuscatune.protocol.tensors import bytes_of

PLAIN = TransformSpec("identity")
"""The side that the paper's scheme leaves as it is."""
_HASHED_AT_ONCE = 1 << 28
"""Bytes: the cipher takes fewer than 2^31 in one call."""


@dataclass(frozen=True)
class Fingerprint:
    """What tells one W from another, to whoever has the root key: a GMAC (NIST SP 800-38D) under a key of its own.

    Over shape, dtype and all elements: under shared secrets, two W that differ somewhere would show their difference
    to the worker, as R_in⁻¹ (W' - W) R_out. Two W chosen without the key have the same tag with a probability of at
    most their count of 16-byte blocks in 2^128, and the tag is shown to nobody, so that its nonce need not change.
    Six times as fast as SHA-256.
    """

    tag: bytes
    key: RootKey

    @classmethod
    def of(cls, W: Tensor, key: RootKey) -> Fingerprint:
        """That of W, contiguous and on the CPU."""
        mac = Cipher(
            algorithms.AES(key.stream("fingerprint").random_bytes(KEY_BYTES)), modes.GCM(bytes(12))
        ).encryptor()
        mac.authenticate_additional_data(f"{tuple(W.shape)} {W.dtype};".encode())
        elements = bytes_of(W)
        for start in range(0, len(elements), _HASHED_AT_ONCE):
            mac.authenticate_additional_data(elements[start : start + _HASHED_AT_ONCE])
        mac.finalize()
        return cls(mac.tag, key)

    def is_of(self, W: Tensor) -> bool:
        """Whether it is that of W."""
        return Fingerprint.of(W, self.key).tag == self.tag

    def __repr__(self) -> str:
        return "Fingerprint(<redacted>)"


@dataclass(frozen=True)
class Obfuscated:
    """W_star (p, q) for the worker, and what the enclave keeps: its transforms, and facts about W."""

    W_star: Tensor
    R_in: Transform
    R_out: Transform
    fingerprint: Fingerprint
    """Fingerprint of W."""
    dtype: torch.dtype
    """The dtype of W; that of W_star may be wider."""
    wide: torch.dtype
    """W_star was computed in this dtype, or in W's if that is wider."""
    only: ResidualRole | None = None
    """The one side that is rotated, None for both."""


def obfuscate(
    W: Tensor,
    key: RootKey,
    spec: TransformSpec,
    name: str,
    epoch: int = 0,
    only: ResidualRole | None = None,
    dtype: torch.dtype | None = None,
    memory: Tensor | None = None,
) -> Obfuscated:
    """Compute W_star = R_in⁻¹ W R_out for W (p, q), contiguous. W is overwritten, unless `dtype` is wider than W's.

    The secrets are derived from the root key, the kind of transform, the re-keying `epoch`, the layer's `name`, the
    side, `only`, and a fingerprint of W. So two models under one root key share no secret, though their layers have the
    same names, and W_star under one kind of transform tells nothing about another.

    The first W_star (epoch 0) is computed in float32, or float64 for a float64 W: twice as fast as float64, and it adds
    less than a third to the rounding error of a float32 product. Later ones are computed in float64, since W may have
    been recovered from the W_star before, and errors would add up.

    Args:
        dtype: of W_star, if wider than W's; None for W's.
        only: the one side that is rotated, as in the paper; the other transform is then 1. None for both sides.
        memory: bytes for a wider W_star, at whose end W may lie (`tiles.widened`); None for memory of its own.
    """
    p, q = W.shape
    fingerprint = Fingerprint.of(W, key)
    wide = torch.float32 if epoch == 0 else torch.float64

    def draw(dim: int, side: str, rotates: ResidualRole) -> Transform:
        if only not in (None, rotates):
            return PLAIN.make(dim, key.stream("plain"))
        return spec.make(dim, key.stream("transform", str(spec), fingerprint.tag.hex(), epoch, name, only or side))

    R_in, R_out = draw(p, "in", "reads"), draw(q, "out", "writes")
    finer = dtype if dtype is not None and is_finer(dtype, W.dtype) else W.dtype
    W_star = transform_in_place(widened(W, memory, finer), R_in, R_out, wide=wide)
    return Obfuscated(W_star, R_in, R_out, fingerprint, W.dtype, wide, only)


def as_fine_as(W: Tensor, dtype: torch.dtype) -> Tensor:
    """W itself, or in `dtype` where that has more significant digits."""
    return W.to(dtype) if is_finer(dtype, W.dtype) else W


def is_finer(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype has more significant digits than the other."""
    return torch.finfo(dtype).eps < torch.finfo(other).eps


def in_range(W_star: Tensor, dtype: torch.dtype) -> float:
    """The power of two that W_star (p, q) is multiplied by before it is rounded to float16; 1 for other dtypes.

    It brings |W_star| / sqrt(max(p, q)) to (1/2, 1]: scaled rows and their products, both ways, are then numbers around
    1, and float16 holds from 6e-8 to 65,504.
    """
    norm = math.sqrt(sum_of_squares(W_star)) if dtype == torch.float16 else 0.0
    if norm == 0:
        return 1.0
    mantissa, exponent = math.frexp(norm / math.sqrt(max(W_star.shape)))
    return math.ldexp(1.0, -exponent + (mantissa == 0.5))


def restored(W_star: Tensor, R_in: Transform, R_out: Transform, dtype: torch.dtype) -> Tensor:
    """R_in W_star R_out⁻¹, computed in float64 and rounded once, to W's dtype: W but for the roundings of W_star."""
    return R_out.inverse(R_in.apply_transpose(W_star.double().T).T).to(dtype).contiguous()
