"""What the tests of slots store, lend, and take for right."""

from __future__ import annotations

import os

import torch

from obfuscatune.enclave import kernels
from obfuscatune.enclave.link import WorkerLink

ID, OTHER, THIRD = bytes(range(1, 17)), bytes(range(2, 18)), bytes(range(3, 19))


def why_none() -> str:
    """Why there can be no slots on this machine; empty where there can."""
    if not kernels.are_there():
        return "no kernels can be compiled here; there are no slots"
    if len(os.sched_getaffinity(0)) < 2:
        return "one core alone: no worker watches"
    return ""


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


W, V = some(96, 130), some(96, 70, seed=1)


def stored(link: WorkerLink, matrix_id: bytes = ID, matrix: torch.Tensor = W) -> WorkerLink:
    link.store(matrix_id, lambda: matrix, shape=tuple(matrix.shape), dtype=matrix.dtype)  # type: ignore[arg-type]
    return link


def lent(link: WorkerLink, rows: torch.Tensor) -> torch.Tensor:
    return link.lend(*rows.shape, rows.dtype).copy_(rows)


def assert_right(found: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor = W) -> None:
    """To the rounding of sums of p products in float32, in any order."""
    exact, size = x.double() @ matrix.double(), x.double().abs() @ matrix.double().abs()
    assert ((found.double() - exact).abs() <= x.shape[1] * torch.finfo(torch.float32).eps * size).all()
