"""The offloaded product y = x W: forward and backward.

    worker holds      W* = R_in⁻¹ W R_out                        sent once
    forward           X* = A [D x R_in; N]     ->  Y* = X* W*    ->  y  = D⁻¹ (Aᵀ Y*)[:n] R_out⁻¹
    backward          G* = A' [D' g R_out⁻ᵀ; N'] -> D* = G* W*ᵀ  ->  dx = D'⁻¹ (A'ᵀ D*)[:n] R_inᵀ

D brings all rows to one size before they are mixed (`scaling`). Exact up to rounding for any invertible R; for
orthogonal R the inverse is the transpose and nothing is amplified. W is frozen, so there is no gradient for it and
nothing of the activations is kept.

A crossing is started, and finished when its product is needed: in between, the enclave does what else there is to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from obfuscatune.enclave.client import ProductRequest, WorkerClient
from obfuscatune.enclave.client.requests import NOT_FINITE
from obfuscatune.enclave.mixing import DENSE_BELOW, FewMixing, Mixer, Mixing
from obfuscatune.enclave.obfuscation import is_finer
from obfuscatune.enclave.observer import span
from obfuscatune.enclave.transforms import Transform
from obfuscatune.enclave.verification import Check, Verifier
from obfuscatune.errors import BadReply, ProtectionError

if TYPE_CHECKING:
    from obfuscatune.enclave.kernels.native import RotationOfFew


Observe = Callable[[Tensor, bool], None]
"""See `Observer.requested`."""


@dataclass(frozen=True)
class FewWay:
    """How few rows go through a product, one way: turned by `turn`, and what came by `back`."""

    turn: RotationOfFew
    back: RotationOfFew


@dataclass(frozen=True)
class Held:
    """W_star as the worker holds it."""

    matrix_id: bytes
    dtype: torch.dtype | None = None
    """In which it was sent, and rows and products travel; None for that of what is multiplied."""
    verifier: Verifier | None = None
    """Of the matrix as it was sent, scaled."""
    scale: float = 1.0
    """The power of two that it was multiplied by, to be in the range of its dtype (`obfuscate.in_range`)."""


@dataclass(frozen=True)
class InFlight:
    """A crossing that was started: what undoes its mixing, and the reply to come; both None where no row crosses."""

    like: Tensor
    """Of the dtype and on the device of what was asked; of few rows, these themselves."""
    mixing: Mixing | FewMixing | None = None
    pending: ProductRequest | None = None
    check: Check | None = None
    """Decides whether the product, in memory of our own, is verified, and does it; None where none is."""
    few: FewWay | None = None
    """Where few rows cross: the mixing is a `FewMixing` then."""
    held: Held | None = None
    """The matrix that the rows were sent for."""

    def scaled_back(self, y: Tensor, dtype: torch.dtype, *, transpose: bool) -> Tensor:
        """The unmixed product y (n, q) of rows that travelled in `dtype`, without the scales of rows and matrix.

        Raises:
            WrongProduct: it is larger than rows and matrix can make it, whatever the lot says; see `Verifier.bound`.
        """
        if self.held is None or self.mixing is None:
            raise ProtectionError("a crossing was finished without what it was begun with")
        if self.held.verifier is not None:
            self.held.verifier.bound(y, self.mixing.rows, self.mixing.size, dtype, transpose=transpose)
        if self.held.scale != 1:
            y.mul_(1 / self.held.scale)
        return self.mixing.scaled_back(y)


class OffloadedProduct:
    """x (n, p) -> x W (n, q) for a W that lies on the worker as W_star."""

    def __init__(
        self,
        client: WorkerClient,
        held: Held,
        R_in: Transform,
        R_out: Transform,
        mixer: Mixer,
        send_in: Callable[[torch.dtype], Held] | None = None,
        observe: Observe | None = None,
    ) -> None:
        """A product with a matrix that the worker holds.

        Args:
            link, held, R_in, R_out, mixer: the worker, W_star there, and the secrets around it.
            send_in: sends W_star once more, in another dtype; None where rows always travel in the one of `held`.
            observe: called with the plain rows of each request, and whether they are for W's transpose.
        """
        self._client, self._held = client, held
        self._R_in, self._R_out = R_in, R_out
        self._mixer, self._send_in, self._observe = mixer, send_in, observe
        self._sending_again = threading.Lock()
        self._ways: dict[tuple[int, torch.dtype, bool], FewWay | None] = {}

    @property
    def held(self) -> Held:
        """W_star as the worker holds it at present."""
        return self._held

    def be_as_fine_as(self, dtype: torch.dtype) -> None:
        """Have the worker hold W_star in a dtype with as many digits as `dtype`: a model that was cast asks for more.

        Once, by whichever thread is first; under the same transforms, so that what crossed before can still be
        differentiated. Nothing where the worker has it so, or where the dtype of what crosses was chosen.

        Raises:
            WireError: the worker failed, or has no room for one more matrix; it holds the one before still.
        """
        if not self.is_coarser_than(dtype):
            return
        with self._sending_again, torch.inference_mode(False), torch.no_grad():
            if self._send_in is None or not self.is_coarser_than(dtype):
                return  # another thread was first
            outdated = self._held
            self._held = self._send_in(torch.promote_types(dtype, outdated.dtype or dtype))
            self._client.forget(outdated.matrix_id)

    def is_coarser_than(self, dtype: torch.dtype) -> bool:
        """Whether `be_as_fine_as` of that dtype sends anything."""
        return self._send_in is not None and self._held.dtype is not None and is_finer(dtype, self._held.dtype)

    @property
    def is_computed_apart(self) -> bool:
        """Whether there is anything to be had from working on while a product is computed."""
        return self._client.computes_apart

    def start_forward(self, x: Tensor) -> InFlight:
        """Send x (n, p)."""
        self._tell(x, transposed=False)
        few = self._send_few(x, transpose=False)
        if few is not None:
            return few
        return self._send(x, self._R_in.apply, transpose=False)

    def finish_forward(self, crossing: InFlight, bias: Tensor | None = None) -> Tensor:
        """y = x W + b (n, q), in x's dtype and on its device; memory of its own. `bias`: b (q,), likewise.

        Raises:
            BadReply: the product is not finite. The link asks this worker nothing any more, as after the next.
            WrongProduct: it is not the product.
            WireError: see `WorkerClient.multiply`.
        """
        if crossing.few is not None:
            y = self._receive_few(crossing, crossing.few, transpose=False)
            return y if bias is None else y.add_(bias)
        unmixed = self._receive(crossing, transpose=False)  # (n, q)
        with span("obfuscatune.rotate"):
            if bias is not None and bias.dtype == unmixed.dtype == crossing.like.dtype:
                return self._R_out.inverse_plus(unmixed, bias)
            y = self._R_out.inverse(unmixed).to(crossing.like.dtype)
            return y if bias is None else y.add_(bias)

    def start_backward(self, g: Tensor) -> InFlight:
        """Send g (n, q)."""
        self._tell(g, transposed=True)
        few = self._send_few(g, transpose=True)
        if few is not None:
            return few
        return self._send(g, self._R_out.inverse_transpose, transpose=True)

    def finish_backward(self, crossing: InFlight) -> Tensor:
        """dx = g Wᵀ (n, p), in g's dtype and on its device; memory of its own. Raises as `finish_forward` does."""
        if crossing.few is not None:
            return self._receive_few(crossing, crossing.few, transpose=True)
        unmixed = self._receive(crossing, transpose=True)  # (n, p)
        with span("obfuscatune.rotate"):
            return self._R_in.apply_transpose(unmixed).to(crossing.like.dtype)

    def _tell(self, rows: Tensor, *, transposed: bool) -> None:
        if self._observe is not None and rows.shape[0]:
            self._observe(rows, transposed)

    def _send(self, x: Tensor, rotate: Callable[[Tensor], Tensor], *, transpose: bool) -> InFlight:
        """Scale, rotate, mix and send rows; they are rounded once, to the dtype that they travel in."""
        like, held = x.new_empty(0), self._held
        dtype = held.dtype or like.dtype
        if x.shape[0] == 0:
            return InFlight(like)
        with span("obfuscatune.mix"):
            A = self._mixer.draw(*x.shape)
            scaled = A.scaled(x)
        with span("obfuscatune.rotate"):
            rotated = rotate(scaled)  # (n, p)
        with span("obfuscatune.mix"):
            X_star = self._client.allocate(A.rows, rotated.shape[1], dtype)  # (m, p)
            as_sent = rotated.dtype == dtype and rotated.device.type == "cpu"
            mixed = X_star if as_sent else rotated.new_empty(X_star.shape)
            A.mix(rotated, mixed)
            if not as_sent:
                X_star.copy_(mixed)
        with span("obfuscatune.send"):
            pending = self._client.submit(
                held.matrix_id, X_star, transpose=transpose, known_finite=as_sent, product_unchecked=True
            )
        check = _check(held.verifier, lambda v: A.image(rotated, v), rotated.dtype, A.size, dtype, transpose)
        return InFlight(like, A, pending, check, held=held)

    def _send_few(self, x: Tensor, *, transpose: bool) -> InFlight | None:
        """Send few rows x (n, p), or (n, q): turned, mixed and laid where they are sent from by one kernel.

        None where there is no such kernel.
        """
        n, held = x.shape[0], self._held
        is_few = 0 < n <= DENSE_BELOW and x.device.type == "cpu" and held.dtype in (None, x.dtype)
        way = self._way(x, transpose=transpose) if is_few else None
        mixing = None if way is None else self._mixer.draw_few(n, way.turn.dim, x.dtype)
        if way is None or mixing is None:
            return None
        with span("obfuscatune.mix"):
            scaled = mixing.scaled(x)
            X_star = self._client.allocate(mixing.rows, way.turn.dim, x.dtype)
            way.turn.send(scaled, mixing.secrets, X_star)
        with span("obfuscatune.send"):
            pending = self._client.submit(
                held.matrix_id, X_star, transpose=transpose, known_finite=True, product_unchecked=True
            )
        check = _check(held.verifier, mixing.image, x.dtype, mixing.size, x.dtype, transpose)
        return InFlight(x, mixing, pending, check, way, held)

    def _receive_few(self, crossing: InFlight, way: FewWay, *, transpose: bool) -> Tensor:
        """Wait for the product; unmixed and turned back by one kernel: (n, q), or (n, p)."""
        x, mixing, pending = crossing.like, crossing.mixing, crossing.pending
        if not isinstance(mixing, FewMixing) or pending is None:
            raise ProtectionError("a crossing of few rows was finished without what it was begun with")
        Y_star = self._awaited(pending, crossing.check)  # (m, q)
        with span("obfuscatune.mix"), self._client.refusing():
            y = x.new_empty(x.shape[0], way.back.dim)
            if not way.back.receive(Y_star, mixing.secrets, y):
                raise BadReply(NOT_FINITE)
            return crossing.scaled_back(y, x.dtype, transpose=transpose)

    def _way(self, x: Tensor, *, transpose: bool) -> FewWay | None:
        key = x.shape[0], x.dtype, transpose
        if key not in self._ways:
            there, back = (self._R_out, self._R_in) if transpose else (self._R_in, self._R_out)
            turn = there.of_few(x.shape[0], x.dtype, undo=False)
            turn_back = back.of_few(x.shape[0], x.dtype, undo=True)
            self._ways[key] = None if turn is None or turn_back is None else FewWay(turn, turn_back)
        return self._ways[key]

    def _receive(self, crossing: InFlight, *, transpose: bool) -> Tensor:
        """Wait for the product and unmix it: (n, q), or (n, p)."""
        width = (self._R_in if transpose else self._R_out).dim
        like = crossing.like
        if crossing.mixing is None or crossing.pending is None or isinstance(crossing.mixing, FewMixing):
            return _widen(like).new_zeros(0, width)
        Y_star = self._awaited(crossing.pending, crossing.check)  # (m, width)
        with span("obfuscatune.mix"), self._client.refusing():
            y = crossing.mixing.unmix(_widen(Y_star.to(like.device)))
            return crossing.scaled_back(y, crossing.pending.dtype, transpose=transpose)

    def _awaited(self, pending: ProductRequest, check: Check | None) -> Tensor:
        """Wait for the product Y* (m, q), and verify it where it is to be verified.

        Where some products are verified every one is copied out of the worker's reach, and only then the lot is drawn:
        a check of what the worker can still change would be none, and a copy of the checked ones alone would show.
        """
        with span("obfuscatune.wait"):
            Y_star = pending.result()
        if check is None:
            return Y_star
        with span("obfuscatune.verify"), self._client.refusing():
            own = _widen(pending.own(Y_star))
            self._client.stats.verified += check(own)
        return own


def _check(
    verifier: Verifier | None,
    image: Callable[[Tensor], Tensor],
    rows: torch.dtype,
    scale: float,
    dtype: torch.dtype,
    transpose: bool,
) -> Check | None:
    """See `Verifier.check_for`; None where no product is verified. To be called once the rows are sent."""
    if verifier is None:
        return None
    with span("obfuscatune.verify"):
        return verifier.check_for(image, rows, scale, dtype, transpose)


def _widen(x: Tensor) -> Tensor:
    """16-bit tensors are rotated and mixed in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
