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
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from obfuscatune.enclave import kernels
from obfuscatune.enclave.client.requests import check_product
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.transforms.base import widen
from obfuscatune.errors import WrongProduct

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


@dataclass(frozen=True)
class Probe:
    """The secret vectors of one request, and what W* makes of them."""

    R: Tensor
    """(q, K), normal of unit variance, float64."""
    V: Tensor
    """W* R (p, K), float64."""
    c: NDArray[np.float64]
    """(K, k), orthonormal: the vectors are r = R c."""
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
        images, squares = (of_rows.numpy() for of_rows in kernels.project(product, self.R))
        if not np.isfinite(squares).all():  # or it is merely large, in float64
            check_product(product, self.party)
        with np.errstate(over="ignore", invalid="ignore"):  # numbers of the worker's, as large as it likes
            deviation = np.abs((images - U.numpy()) @ self.c).max(axis=1)
            tau = self._tolerance(squares, product.shape[1], scale, dtype)
            return float(np.where(np.isfinite(tau), deviation / tau, math.inf).max())

    def tolerance(self, product: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """tau for each row (m,) of a product (m, q), float64.

        A row may be small because large ones cancelled in mixing, and then errs as they do: so the average counts too.
        No row of the true product is larger than |X*| |W|, so a row that came counts for no more than that.
        """
        squares = kernels.project(product, self.R).squares.numpy()
        return torch.from_numpy(self._tolerance(squares, product.shape[1], scale, dtype))

    def _tolerance(
        self, squares: NDArray[np.float64], width: int, scale: float, dtype: torch.dtype
    ) -> NDArray[np.float64]:
        """By the sums of squares (m,) of the rows, of `width` elements."""
        rounding = torch.finfo(dtype)
        expected = scale * self.norm  # the size of a row, for a matrix that amplifies all directions alike
        largest = _largest(len(squares), self.V.shape[0], scale, self.norm)
        squares = np.minimum(squares, largest**2)
        subnormal = rounding.tiny * (math.sqrt(width) + self.norm)  # elements below tiny err by eps tiny / 2
        size: NDArray[np.float64] = np.sqrt(squares) + (expected + math.sqrt(squares.mean()) + subnormal)
        of_masks = MARGIN[torch.float64] * torch.finfo(torch.float64).eps / 2 * self.mask_size * self.norm
        return MARGIN[dtype] * rounding.eps / 2 * size + of_masks


def _largest(m: int, p: int, scale: float, norm: float) -> float:
    """2 |X*| |W|: the product of m rows of p elements has no larger norm, nor any part of it."""
    return SCATTER * math.sqrt(m * p) * scale * norm


def _orthonormal(c: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal columns in the place of a few normal ones (K, k), by Gram and Schmidt: QR takes longer."""
    for j in range(c.shape[1]):
        column = c[:, j]
        if j:
            column -= c[:, :j] @ (column @ c[:, :j])
        column /= math.sqrt(column @ column)
    return c


def _images(W: Tensor, R: Tensor, L: Tensor) -> tuple[Tensor, Tensor, float]:
    """W R (p, K), Wᵀ L (q, K) and |W| for R (q, K) and L (p, K)."""
    return kernels.kernels_for(W).sketch(W, R, L)


class Verifier:
    """Checks products of one matrix."""

    def __init__(self, W_star: Tensor, stream: SecretStream, share: float) -> None:
        """Computes the images of `BASIS` vectors, both ways, and the norm, from W_star (p, q).

        Args:
            stream: nothing that a worker knows or can repeat.
            share: of the requests that are checked, drawn by lot; above 0.
        """
        self._stream, self._share = stream, share
        self._vectors = VECTORS[W_star.dtype]
        W = widen(W_star)
        p, q = W.shape
        self._R = stream.normal(q, BASIS, dtype=W.dtype)
        self._L = stream.normal(p, BASIS, dtype=W.dtype)
        W_R, W_L, self._norm = _images(W, self._R, self._L)
        self._R, self._L, self._WR, self._WtL = (x.double() for x in (self._R, self._L, W_R, W_L))

    def probe(self, *, transpose: bool, party: str = "worker", mask_size: float = 0.0) -> Probe:
        """Fresh vectors for one request to that party; see `Probe`."""
        vectors, images = (self._L, self._WtL) if transpose else (self._R, self._WR)
        c = _orthonormal(self._stream.normal(BASIS, self._vectors).numpy())
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
        self, y: Tensor, m: int, scale: float, dtype: torch.dtype, *, transpose: bool, party: str = "worker"
    ) -> None:
        """Hold every product, drawn or not, against what no product exceeds: one pass, nothing secret in it.

        Args:
            y: the unmixed rows (n, q), rotated back or not, before they are scaled back.
            m: how many rows were sent.
            scale: see `Probe.check`.
            dtype: in which rows and product travelled.
            transpose: whether the rows were multiplied by W*ᵀ.
            party: see `Probe`.

        Raises:
            WrongProduct: it is larger, or not finite: worse than what the check by lot would have found.
        """
        vectors = self._R if transpose else self._L
        subnormal = torch.finfo(dtype).tiny * math.sqrt(
            y.numel()
        )  # to whose multiples the smallest products are rounded
        largest = _largest(m, vectors.shape[0], scale, self._norm) + subnormal
        if not float(torch.linalg.vector_norm(y)) <= largest:  # it overflows before y does
            norm = float(torch.linalg.vector_norm(y, dtype=torch.float64))
            if not norm <= largest:
                raise WrongProduct(
                    f"the {party}'s product is wrong: it is {norm / largest:.3g} times as large as the rows and the "
                    f"matrix can make it. The {party} is hostile or broken; nothing was done with the product"
                )

    def _is_drawn(self) -> bool:
        return int.from_bytes(self._stream.random_bytes(4)) < self._share * 2**32
