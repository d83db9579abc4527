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
from obfuscatune.enclave.transforms import Transform, TransformSpec
from obfuscatune.wire.tensors import bytes_of


@dataclass(frozen=True)
class Obfuscated:
    """What the worker gets, and what the enclave keeps of it."""

    W_star: Tensor
    R_in: Transform
    R_out: Transform
    fingerprint: str
    """Of the W that it was made from."""


def joint_weight(layers: tuple[nn.Linear | Conv1D, ...], weights: tuple[Tensor, ...]) -> Tensor:
    """The weights of layers that share an input as one W (p, q): y = x W."""
    return torch.cat([W if isinstance(layer, Conv1D) else W.T for layer, W in zip(layers, weights, strict=True)], dim=1)


def obfuscate(W: Tensor, key: RootKey, spec: TransformSpec, name: str, epoch: int = 0) -> Obfuscated:
    """W_star = R_in⁻¹ W R_out for W (p, q): computed in float64, rounded once to W's dtype.

    The secrets follow from the root key, the kind of transform, the re-keying `epoch`, the layer's `name`,
    the side, and a fingerprint of W itself: two models under one root key share no secret, though their layers
    have the same names, and W* of one transform tells nothing of another's.
    """
    p, q = W.shape
    print_of_W = fingerprint(W)
    R_in = spec.make(p, key.stream("transform", str(spec), print_of_W, epoch, name, "in"))
    R_out = spec.make(q, key.stream("transform", str(spec), print_of_W, epoch, name, "out"))
    W_star = R_out.weight_right(R_in.weight_left(W.double()))
    return Obfuscated(W_star.to(W.dtype).contiguous(), R_in, R_out, print_of_W)


def fingerprint(W: Tensor) -> str:
    """SHA-256 of W's shape, dtype and elements.

    All of them: under shared secrets, two W that differ somewhere would show their difference to the worker, as
    R_in⁻¹ (W' - W) R_out.
    """
    digest = hashlib.sha256(f"{tuple(W.shape)} {W.dtype}".encode())
    digest.update(bytes_of(W.detach().contiguous()))
    return digest.hexdigest()
