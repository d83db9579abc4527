"""What calls show of themselves whatever mixed their rows: row spaces and second moments.

Where a relative W_0 of W is public, the secret bases in which W* and the traffic are written can be found:

    W*  W*ᵀ  =  R_inᵀ (W Wᵀ) R_in          known on both sides but for R_in, as W ≈ W_0
    traffic  =  R_inᵀ (C) R_in + noise     C: what public text brings to the same layer
    W*       =  R_inᵀ W R_out

The eigenvectors of the Gram matrices are matched by rank, their signs by the traffic's covariance. (Climbing all three
equations together from there made it worse on every layer that was tried: public text is not the private one.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.audit.attacks.knowledge import PublicBase
from obfuscatune.audit.attacks.scoring import pairs_of
from obfuscatune.audit.attacks.view import SeenCall, WorkerView

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


MOST_ROWS = 30_000
"""Of the traffic; more would take minutes where calls are filled up to a wide layer's rank."""


@dataclass(frozen=True)
class Aligned:
    """Estimates for one layer: W_star ≈ R_inᵀ W R_out. The wider one of the two is known on the range of W alone."""

    R_in: Tensor
    R_out: Tensor


def polar(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix."""
    U, _, Vh = torch.linalg.svd(matrix)
    nearest: Tensor = U @ Vh
    return nearest


def observed_covariance(calls: Sequence[SeenCall]) -> Tensor:
    """Second moment of forward calls by one matrix, each call counted alike, without its isotropic part."""
    looked_at = calls[: max(1, MOST_ROWS // calls[0].count)]
    rows = torch.cat([call.rows / call.rows.norm() for call in looked_at])
    mean: Tensor = rows.T @ rows / len(rows)
    isotropic = torch.linalg.eigvalsh(mean).median() * torch.eye(len(mean), dtype=mean.dtype)
    return torch.sub(mean, isotropic)


def align(view: WorkerView, base: PublicBase, layer: int) -> Aligned:
    """R_in and R_out of a layer, as well as the public base tells; of its newest, where it was re-keyed."""
    calls = view.of_newest_matrix(layer)
    W_star = view.matrices[calls[0].matrix].W_star
    return align_two_sided(base.weights[layer], W_star, base.covariances[layer], observed_covariance(calls))


def align_two_sided(W: Tensor, W_star: Tensor, expected: Tensor, observed: Tensor) -> Aligned:
    """R_in (p, p) and R_out (q, q) from W (p, q) and covariances (p, p) of the inputs on both sides."""
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    U_star, _, Vh_star = torch.linalg.svd(W_star, full_matrices=False)
    signs = agreeing_signs((U.T @ expected @ U) * (U_star.T @ observed @ U_star))
    # W = U S Vh and W* = R_inᵀ W R_out: a right singular vector has the sign of its left one.
    return Aligned((U * signs) @ U_star.T, (Vh.T * signs) @ Vh_star)


def _polar_of_product(a: Tensor, b: Tensor) -> Tensor:
    """`polar` of aᵀ b (q, q) for a and b (p, q); where q > p on the range of a and b alone, without an SVD of q."""
    if a.shape[1] <= a.shape[0]:
        return polar(a.T @ b)
    (Q_a, R_a), (Q_b, R_b) = torch.linalg.qr(a.T), torch.linalg.qr(b.T)
    nearest: Tensor = Q_a @ polar(R_a @ R_b.T) @ Q_b.T
    return nearest


def align_one_sided(W: Tensor, W_star: Tensor) -> Aligned:
    """R_in (p, p) and R_out (q, q), one of which is 1: the one without which W* fits W (p, q) better."""
    left = Aligned(polar(W @ W_star.T), torch.eye(W.shape[1], dtype=W.dtype))
    right = Aligned(torch.eye(W.shape[0], dtype=W.dtype), _polar_of_product(W, W_star))
    return min((left, right), key=lambda it: float((it.R_in @ W_star @ it.R_out.T - W).norm()))


def agreeing_signs(agreement: Tensor) -> Tensor:
    """d in {-1, 1}^p for which the sum of d_i d_j agreement_ij (p, p) is large: spectral start, then single flips."""
    agreement = agreement - torch.diag(agreement.diagonal())
    _, vectors = torch.linalg.eigh(agreement)
    signs = torch.where(vectors[:, -1] < 0, -1.0, 1.0).to(agreement.dtype)
    pulls = agreement @ signs
    for _ in range(4 * len(signs)):
        gains = signs * pulls
        worst = int(gains.argmin())
        if gains[worst] >= 0:
            break
        signs[worst] = -signs[worst]
        pulls += 2 * signs[worst] * agreement[worst]
    return signs
