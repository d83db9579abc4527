"""Blind source separation: mixed rows taken apart because sums look more normal than what they are sums of.

It needs rows whose elements are not normal. A right rotation makes them normal, which is what it is there for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.geometry import orthonormal_rows
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.scoring import Truth
from obfuscatune.audit.attacks.view import WorkerView

STEPS = 200
MOST_CALLS = 60


@dataclass(frozen=True)
class SourceGuess:
    """For each call the separated rows (r, p), of length 1, all in its row space."""

    sources: Mapping[int, Tensor]
    seed: int


class SourceSeparation:
    """FastICA over the columns of each decoding call: is one of the sources the token's row?"""

    name = "source-separation"
    needs = Attacker.CLOSED
    target = Target.TOKENS
    measure = "cosine of the best separated row with the true one, in the worker's basis"
    source = "Hyvärinen 1999 (FastICA, tanh)"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> SourceGuess:
        """Sources of each call."""
        calls = [call for call in view.decoding(0)[:MOST_CALLS] if 1 < call.count < call.width]
        if not calls:
            raise CannotRun("no call has several rows and room beside them")
        return SourceGuess({call.index: separate(call.rows, seed) for call in calls}, seed)

    def score(self, guess: SourceGuess, truth: Truth) -> Finding:
        """|cos| of the nearest source; chance is the same with a random basis of the same row space."""
        generator = torch.Generator().manual_seed(guess.seed)
        found, luck = [], []
        for index, sources in guess.sources.items():
            call = truth.calls[index]
            row = torch.nn.functional.normalize(truth.rotated(call), dim=1)
            basis = orthonormal_rows(sources)
            turn, _ = torch.linalg.qr(torch.randn(len(basis), len(basis), dtype=basis.dtype, generator=generator))
            found.append((row @ sources.T).abs().max(1).values.mean())
            luck.append((row @ (turn @ basis).T).abs().max(1).values.mean())
        values = torch.stack(found)
        error = float((values - torch.stack(luck)).std()) / len(found) ** 0.5
        return Finding(float(values.mean()), float(torch.stack(luck).mean()), 1.0, len(found), error)


def separate(rows: Tensor, seed: int) -> Tensor:
    """Independent components (r, p) of mixtures (m, p): whitened, then FastICA with tanh, all at once."""
    centred = rows - rows.mean(1, keepdim=True)
    white = orthonormal_rows(centred) * rows.shape[1] ** 0.5
    r, p = white.shape
    generator = torch.Generator().manual_seed(seed)
    W = torch.linalg.qr(torch.randn(r, r, dtype=rows.dtype, generator=generator))[0]
    for _ in range(STEPS):
        projected = W @ white
        bent = torch.tanh(projected)
        W_new = bent @ white.T / p - (1 - bent.square()).mean(1)[:, None] * W
        U, _, Vh = torch.linalg.svd(W_new)
        W_new = U @ Vh
        change = float((1 - (W_new * W).sum(1).abs()).max())
        W = W_new
        if change < 1e-8:
            break
    # The centring belongs to the estimate alone: sources are combinations of the rows themselves.
    combined = torch.linalg.lstsq(centred.T, (W @ white).T).solution.T @ rows
    return torch.nn.functional.normalize(combined, dim=1)
