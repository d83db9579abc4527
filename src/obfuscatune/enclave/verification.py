"""Is a product the product? Freivalds' check (1977), for rounded arithmetic.

    at the upload     R (q, K) normal, secret;  V = W* R           (p, K)   once for each matrix, and for its transpose
    for a request     c (K, k), orthonormal: r = R c               (q, k)   fresh
                      U = X* V = A [x R_in V; N V]                 (m, K)   from what the enclave sent, not read back
    for its reply     |Y* r - X* W* r| = |(Y* R - U) c| <= tau, in every row    one pass over a private copy of Y*

Y* = X* W* + E differs by E r, and whatever the worker makes of a row e of E, e·r is normal with the standard
deviation |e|: a worker that does not know r is overlooked with

    P <= (0.8 tau / |e|)^k

whichever elements it changed, by how much and in what pattern. tau follows from rounding: both sides of the
comparison are sums of products, whose rounding errors grow with |x*| |W*| and |y*| in the precision of the reply.
The reply can lower tau and not raise it above what |X*| |W*|, which the enclave knows before, allows for |y*|.

Where only a share of the requests is checked, the lot is drawn when the product is in memory of our own, and nothing
of the check is computed before: a worker that could tell from the time that passes would spare the checked ones.

Sums of the enclave's own are made in float64 (`kernels.project`): they err no more than rounding at the end would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from obfuscatune.enclave import kernels
from obfuscatune.enclave.client.requests import check_product
from obfuscatune.enclave.kernels import Tolerance
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.errors import WrongProduct

CONVERTED_ELEMENTS = 1 << 22
"""Of a matrix that are converted to another dtype at a time, for the images."""
BASIS = 8
"""K: vectors whose images are computed once. Each request is checked by fresh combinations of them."""
VECTORS = {torch.float64: 2, torch.float32: 2, torch.bfloat16: 4, torch.float16: 4}
"""k: combinations for one request. More where rounding explains much: of a row twice as large as it should be, two
vectors overlook one in 500 in bfloat16, and four one in 200,000."""
MARGIN = {torch.float64: 64.0, torch.float32: 64.0, torch.bfloat16: 4.0, torch.float16: 4.0}
"""tau over the unit roundoff times the size of the operands. More where the worker also accumulates in that precision;
`bench verify` measures what honest workers need."""
SCATTER = 2.0
"""Shield rows are random: how much larger than expected all rows together may be. Of 64 random numbers, the root mean
square exceeds it once in 10^22 requests."""


Check = Callable[[Tensor], bool]
"""Holds a product, in memory of our own, against what it must be, if the lot falls on it: whether it did. Raises
`BadReply` where it is not finite, and `WrongProduct` where it is not the product."""


class Probe(NamedTuple):
    """The secret vectors of one request, and what W* makes of them."""

    R: Tensor
    """(q, K), normal of unit variance, float64."""
    V: Tensor
    """W* R (p, K), float64."""
    c: Tensor
    """(K, k), float64, orthonormal: the vectors are r = R c."""
    norm: float
    """|W*|, the root of the sum of all squares."""
    party: str = "worker"
    """Whose products it checks, as an error calls it."""
    mask_size: float = 0.0
    """Root mean square of the elements of the masks, float64, that were added to the rows and whose product was taken
    away: what is left of them is rounding."""

    def check(self, product: Tensor, U: Tensor, scale: float, dtype: torch.dtype) -> None:
        """Hold a product (m, q), in memory of our own, against U = X* V (m, K), float64, on the CPU.

        Args:
            scale: root mean square of the elements of all rows that were sent, shield rows among them; without masks.
            dtype: in which rows and product travelled; of masked rows, in which they were mixed.

        Raises:
            BadReply: it is not finite.
            WrongProduct: it is not the product of the rows and the matrix.
        """
        excess = self.excess(product, U, scale, dtype)
        if not excess <= 1:  # NaN is not, either
            raise WrongProduct(
                f"the {self.party}'s product is wrong: a check by secret vectors is off by {excess:.3g} times what "
                f"rounding explains. The {self.party} is hostile, broken, or computes in a lower precision than the "
                "model (its --dtype); nothing was done with the product"
            )

    def excess(self, product: Tensor, U: Tensor, scale: float, dtype: torch.dtype) -> float:
        """The largest deviation of any row, over that row's tau; infinite or NaN where either is not finite.

        Raises:
            BadReply: the product is not finite.
        """
        tolerance = self._tolerance(product, scale, dtype)
        excess, finite = kernels.excess(product, self.R, U, self.c, tolerance)
        if not finite:  # or it is merely large, in float64
            check_product(product, self.party)
        return excess

    def tolerance(self, product: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """tau for each row (m,) of a product (m, q), float64.

        A row may be small because large ones cancelled in mixing, and then errs as they do: so the average counts too.
        No row of the true product is larger than |X*| |W|, so a row that came counts for no more than that.
        """
        squares = kernels.project(product, self.R).squares.numpy()
        return torch.from_numpy(self._tolerance(product, scale, dtype).of(squares))

    def __repr__(self) -> str:
        return "Probe(<redacted>)"

    def _tolerance(self, product: Tensor, scale: float, dtype: torch.dtype) -> Tolerance:
        m, width = product.shape
        eps, tiny, margin = _ROUNDING[dtype]
        expected = scale * self.norm  # the size of a row, for a matrix that amplifies all directions alike
        subnormal = tiny * (math.sqrt(width) + self.norm)  # elements below tiny err by eps tiny / 2
        of_masks = _OF_MASKS * self.mask_size * self.norm
        largest = _largest(m, self.V.shape[0], scale, self.norm)
        return Tolerance(margin * eps / 2, expected + subnormal, of_masks, largest)


_ROUNDING = {dtype: (torch.finfo(dtype).eps, torch.finfo(dtype).tiny, margin) for dtype, margin in MARGIN.items()}
"""Of a dtype: eps, the smallest normal number, and the margin."""
_OF_MASKS = MARGIN[torch.float64] * torch.finfo(torch.float64).eps / 2


def _largest(m: int, p: int, scale: float, norm: float) -> float:
    """2 |X*| |W|: the product of m rows of p elements has no larger norm, nor any part of it."""
    return SCATTER * math.sqrt(m * p) * scale * norm


def norm_of(y: Tensor) -> float:
    """The root of the sum of all squares; in float64 where float32 overflows before y does."""
    norm = float(torch.linalg.vector_norm(y))
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(y, dtype=torch.float64))


def _images(W: Tensor, R: Tensor, L: Tensor) -> tuple[Tensor, Tensor, float]:
    """W R (p, K), Wᵀ L (q, K) and |W| for R (q, K) and L (p, K), in their dtype.

    A W of another dtype is converted some rows at a time: it may be as large as memory allows.
    """
    if W.dtype == R.dtype:
        return kernels.kernels_for(W).sketch(W, R, L)
    (p, q), rows = W.shape, max(1, CONVERTED_ELEMENTS // W.shape[1])
    W_R, W_L, squares = torch.empty(p, R.shape[1], dtype=R.dtype), torch.zeros(q, L.shape[1], dtype=torch.float64), 0.0
    memory = torch.empty(min(rows, p), q, dtype=R.dtype)  # the same for all: else the heap grows with each
    for start in range(0, p, rows):
        stop = min(start + rows, p)
        wide = memory[: stop - start].copy_(W[start:stop])
        W_R[start:stop], of_tile, norm = kernels.kernels_for(wide).sketch(wide, R, L[start:stop])
        W_L += of_tile
        squares += norm**2
    return W_R, W_L, math.sqrt(squares)


class Verifier:
    """Checks products of one matrix."""

    def __init__(self, W_star: Tensor, stream: SecretStream, share: float, dtype: torch.dtype | None = None) -> None:
        """Computes the images of `BASIS` vectors, both ways, and the norm, from W_star (p, q).

        Args:
            stream: nothing that a worker knows or can repeat.
            share: of the requests that are checked, drawn by lot; above 0.
            dtype: in which rows and products travel, where that is wider than W_star's; None for W_star's.
        """
        self._stream, self._share = stream, share
        self._vectors = VECTORS[dtype or W_star.dtype]
        self._wide = torch.promote_types(dtype or W_star.dtype, torch.float32)
        self.renew(W_star)

    def renew(self, W_star: Tensor) -> None:
        """Draw other vectors for the same W_star (p, q): whoever was refused has learnt something of those before.

        Requests that are under way are checked by the vectors that they have.
        """
        p, q = W_star.shape
        R = self._stream.normal(q, BASIS, dtype=self._wide)
        L = self._stream.normal(p, BASIS, dtype=self._wide)
        W_R, W_L, self._norm = _images(W_star, R, L)
        self._forward, self._backward = (R.double(), W_R.double()), (L.double(), W_L.double())

    def probe(self, *, transpose: bool, party: str = "worker", mask_size: float = 0.0) -> Probe:
        """Fresh vectors for one request to that party; see `Probe`."""
        vectors, images = self._backward if transpose else self._forward
        c = kernels.directions(self._stream.random_bytes(8 * BASIS * self._vectors), self._vectors)
        return Probe(vectors, images, c, self._norm, party, mask_size)

    def check_for(
        self,
        image: Callable[[Tensor], Tensor],
        scale: float,
        dtype: torch.dtype,
        *,
        transpose: bool,
        party: str = "worker",
        mask_size: float = 0.0,
    ) -> Check:
        """The check of one request. To be called once it is sent, and what comes of it once the product is here.

        Args:
            image: makes X* V (m, K), float64, of V (p, K), float64.
            scale: see `Probe.check`.
            dtype: in which rows and product travel.
            transpose: whether the rows are multiplied by W*ᵀ.
            party, mask_size: see `Probe`.
        """

        def prepare() -> tuple[Probe, Tensor]:
            probe = self.probe(transpose=transpose, party=party, mask_size=mask_size)
            return probe, image(probe.V).cpu()

        prepared = prepare() if self._share >= 1 else None  # there is no lot to be kept secret: while it is computed

        def check(product: Tensor) -> bool:
            if prepared is None and not self._is_drawn():
                return False
            probe, U = prepared or prepare()
            probe.check(product, U, scale, dtype)
            return True

        return check

    def bound(
        self, norm: float, elements: int, m: int, scale: float, dtype: torch.dtype, *,
        transpose: bool, party: str = "worker",
    ) -> None:  # fmt: skip
        """Hold every product, drawn or not, against what no product exceeds: nothing secret is in it.

        Args:
            norm, elements: of the unmixed rows (n, q), rotated back or not, before they are scaled back.
            m: how many rows were sent.
            scale: see `Probe.check`.
            dtype: in which rows and product travelled.
            transpose: whether the rows were multiplied by W*ᵀ.
            party: see `Probe`.

        Raises:
            WrongProduct: it is larger, or not finite: worse than what the check by lot would have found.
        """
        vectors, _ = self._forward if transpose else self._backward
        tiny = _ROUNDING[dtype][1]  # to whose multiples the smallest products are rounded
        largest = _largest(m, vectors.shape[0], scale, self._norm) + tiny * math.sqrt(elements)
        if not norm <= largest:
            raise WrongProduct(
                f"the {party}'s product is wrong: it is {norm / largest:.3g} times as large as the rows and the "
                f"matrix can make it. The {party} is hostile or broken; nothing was done with the product"
            )

    def _is_drawn(self) -> bool:
        return int.from_bytes(self._stream.random_bytes(4)) < self._share * 2**32
