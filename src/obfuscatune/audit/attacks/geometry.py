"""What calls show of themselves whatever mixed their rows: row spaces and second moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obfuscatune.audit.attacks.scoring import pairs_of
from obfuscatune.audit.attacks.view import SeenCall

_PAIRS_AT_ONCE = 4096


def orthonormal_rows(rows: Tensor) -> Tensor:
    """An orthonormal basis (r, p) of the row space of (m, p)."""
    _, values, Vh = torch.linalg.svd(rows, full_matrices=False)
    basis: Tensor = Vh[: int((values > values[0] * 1e-5).sum())]
    return basis


def second_moment(rows: Tensor) -> Tensor:
    """rowsᵀ rows (p, p), of trace 1."""
    moment = rows.T @ rows
    return moment / torch.trace(moment)


def similarities(calls: Sequence[SeenCall]) -> Tensor:
    """For all pairs i < j of calls, how much they seem to have in common.

    Where two row spaces leave room beside each other, the largest cosine between them (1: a common direction). Where
    they fill the space, the inner product of the second moments, less what all calls have.
    """
    p = calls[0].width
    if 2 * max(call.count for call in calls) < p:
        return _largest_cosines([orthonormal_rows(call.rows) for call in calls])
    moments = torch.stack([second_moment(call.rows).flatten() for call in calls])
    moments -= moments.mean(0)
    moments /= moments.norm(dim=1, keepdim=True)
    i, j = pairs_of(len(calls))
    return (moments @ moments.T)[i, j]


def _largest_cosines(bases: list[Tensor]) -> Tensor:
    rank = max(basis.shape[0] for basis in bases)
    stacked = torch.stack([torch.nn.functional.pad(basis, (0, 0, 0, rank - basis.shape[0])) for basis in bases])
    i, j = pairs_of(len(bases))
    largest = []
    for first, second in zip(i.split(_PAIRS_AT_ONCE), j.split(_PAIRS_AT_ONCE), strict=True):
        products = stacked[first] @ stacked[second].transpose(1, 2)
        largest.append(torch.linalg.matrix_norm(products, ord=2))
    return torch.cat(largest).clamp_max(1.0)


def overlaps(calls: Sequence[SeenCall]) -> Tensor:
    """For all pairs i < j of calls, how many directions they share: each counts by how near it is to both.

    Sum over the cosines c between two row spaces of -log(1 - c²): exact ones weigh most. As `similarities` where the
    row spaces fill the space.
    """
    p = calls[0].width
    if 2 * max(call.count for call in calls) >= p:
        return similarities(calls)
    bases = [orthonormal_rows(call.rows) for call in calls]
    i, j = pairs_of(len(calls))
    weights = []
    for a, b in zip(i.tolist(), j.tolist(), strict=True):
        cosines = torch.linalg.svdvals(bases[a] @ bases[b].T)
        weights.append(-torch.log1p(1e-6 - cosines.square().clamp_max(1.0)).sum())
    return torch.stack(weights)
