"""From a group's weights to W_star and the transforms that undo it.

weights of q, k, v  ->  W (p, q)  ->  R_in, R_out from the root key  ->  W_star = R_in⁻¹ W R_out
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.keys import RootKey
from obfuscatune.enclave.panels import transform_in_place
from obfuscatune.enclave.sides import ResidualSide
from obfuscatune.enclave.transforms import Transform, TransformSpec
from obfuscatune.wire.tensors import bytes_of

PLAIN = TransformSpec("identity")
"""The side that the paper's scheme leaves as it is."""


@dataclass(frozen=True)
class Obfuscated:
    """What the worker gets, and what the enclave keeps of it."""

    W_star: Tensor
    R_in: Transform
    R_out: Transform
    fingerprint: str
    """Of the W that it was made from."""
    only: ResidualSide | None = None
    """The one side that is rotated, None for both."""


def joint_weight(layers: tuple[nn.Linear | Conv1D, ...], weights: tuple[Tensor, ...]) -> Tensor:
    """The weights of layers that share an input as one W (p, q): y = x W."""
    return torch.cat([W if isinstance(layer, Conv1D) else W.T for layer, W in zip(layers, weights, strict=True)], dim=1)


def obfuscate(
    W: Tensor, key: RootKey, spec: TransformSpec, name: str, epoch: int = 0, only: ResidualSide | None = None
) -> Obfuscated:
    """W_star = R_in⁻¹ W R_out for W (p, q) contiguous, in whose place it is made.

    The secrets follow from the root key, the kind of transform, the re-keying `epoch`, the layer's `name`,
    the side, and a fingerprint of W itself: two models under one root key share no secret, though their layers
    have the same names, and W* of one transform tells nothing of another's.

    `only`: rotate the paper's one side alone; the other transform is then 1. Under secrets of its own too.
    """
    p, q = W.shape
    print_of_W = fingerprint(W)

    def draw(dim: int, side: str, rotates: ResidualSide) -> Transform:
        if only not in (None, rotates):
            return PLAIN.make(dim, key.stream("plain"))
        return spec.make(dim, key.stream("transform", str(spec), print_of_W, epoch, name, only or side))

    R_in, R_out = draw(p, "in", "reads"), draw(q, "out", "writes")
    return Obfuscated(transform_in_place(W, R_in, R_out), R_in, R_out, print_of_W, only)


def restored(W_star: Tensor, R_in: Transform, R_out: Transform) -> Tensor:
    """R_in W_star R_out⁻¹, computed in float64 and rounded once: W but for the roundings to its dtype."""
    return R_out.inverse(R_in.apply_transpose(W_star.double().T).T).to(W_star.dtype).contiguous()


def fingerprint(W: Tensor) -> str:
    """SHA-256 of W's shape, dtype and elements.

    All of them: under shared secrets, two W that differ somewhere would show their difference to the worker, as
    R_in⁻¹ (W' - W) R_out.
    """
    digest = hashlib.sha256(f"{tuple(W.shape)} {W.dtype}".encode())
    digest.update(bytes_of(W.detach().contiguous()))
    return digest.hexdigest()
