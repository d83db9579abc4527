"""The offloaded product y = x W: forward and backward.

    worker holds      W* = R_in⁻¹ W R_out                        sent once
    forward           X* = A [D x R_in; N]     ->  Y* = X* W*    ->  y  = D⁻¹ (Aᵀ Y*)[:n] R_out⁻¹
    backward          G* = A' [D' g R_out⁻ᵀ; N'] -> D* = G* W*ᵀ  ->  dx = D'⁻¹ (A'ᵀ D*)[:n] R_inᵀ

Under `guarded` the worker sees X* under a one-time mask, and another party makes the mask's product (`masks`):

    X' = round(X*) + r   ->   X' W*   ->   Y* = X' W* - r W*

D brings all rows to one size before they are mixed (`mixing`). Exact up to rounding for any invertible R; for
orthogonal R the inverse is the transpose and nothing is amplified. W is frozen, so there is no gradient for it and
nothing of the activations is kept.

A crossing is started, and finished when its product is needed: in between, the enclave does what else there is to do.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from obfuscatune.enclave.client import PendingProduct, WorkerLink
from obfuscatune.enclave.client.requests import check_finite, not_finite
from obfuscatune.enclave.masks import LayerMasks, Mask, Masked
from obfuscatune.enclave.mixing import DENSE_BELOW, FewMixing, Mixer, Mixing
from obfuscatune.enclave.obfuscation import is_finer
from obfuscatune.enclave.observer import span
from obfuscatune.enclave.transforms import Transform
from obfuscatune.enclave.transforms.base import widen
from obfuscatune.enclave.verification import Check, Verifier, norm_of
from obfuscatune.errors import BadReply, WrongProduct

if TYPE_CHECKING:
    from obfuscatune.enclave.kernels.native import RotationOfFew


Observe = Callable[[Tensor, bool], None]
"""See `Observer.requested`."""
TurnBack = Callable[[Tensor, Tensor | None, torch.dtype], Tensor]
"""Of an unmixed product, a bias or None, and the dtype that is asked for: the product, rotated back, plus the bias."""


@dataclass(frozen=True)
class Held:
    """W_star as the worker holds it."""

    matrix_id: bytes
    dtype: torch.dtype | None = None
    """In which it was sent, and rows and products travel; None for that of what is multiplied."""
    verifier: Verifier | None = None
    """Of the matrix as it was sent, scaled."""
    scale: float = 1.0
    """The power of two that it was multiplied by, to be in the range of its dtype (`obfuscation.in_range`)."""
    masked: Masked | None = None
    """The same matrix at the mask worker, under another id; None without masks."""


class Passage(Protocol):
    """How the rows of one request are laid down where they are sent from, and what comes of their product.

    There is one for few rows, a kernel each way, and one for many. Both are driven by the same steps.
    """

    @property
    def mixing(self) -> Mixing | FewMixing:
        """The secrets of this request."""

    def lay_down(self, X_star: Tensor) -> bool:
        """Rotate and mix the rows into X* (m, p); whether all of it is known to be finite.

        Raises:
            NonFiniteError: the rows contain NaN or infinity.
        """

    def image(self, v: Tensor) -> Tensor:
        """X* v (m, k), float64, for v (p, k), of the rows that were laid down, without reading X* back."""

    def take_up(self, Y_star: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, float]:
        """Y* (m, q) -> the rows that were asked for (n, q), in memory of their own and the dtype of what was asked.

        Args:
            Y_star: the product; it may lie where the worker can write to it, so only the result is looked at.
            bias: (q,), to be added; or None.
            scale: what W was multiplied by.

        Returns:
            The rows; and the norm of all of them together while they were still scaled, for `Verifier.bound`.

        Raises:
            BadReply: the product contains NaN or infinity.
        """


@dataclass(frozen=True)
class FewWay:
    """How few rows go through a product, one way: turned by `turn`, and what came by `back`."""

    turn: RotationOfFew
    back: RotationOfFew


class FewRows:
    """The passage of few rows on the CPU: a kernel lays them down; one takes up their product and turns it back."""

    def __init__(self, x: Tensor, way: FewWay, mixing: FewMixing) -> None:
        self.mixing = mixing
        self._way, self._x = way, x if x.stride(1) == 1 else x.contiguous()

    def lay_down(self, X_star: Tensor) -> bool:
        """See `Passage`."""
        if not self._way.turn.send(self._x, self.mixing.secrets, X_star):
            check_finite(self._x)
        return True

    def image(self, v: Tensor) -> Tensor:
        """See `Passage`."""
        return self.mixing.secrets.image(v)

    def take_up(self, Y_star: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, float]:
        """See `Passage`; no W of float32 or float64 is scaled (`obfuscation.in_range`)."""
        fits = bias is not None and bias.dtype == Y_star.dtype and bias.is_contiguous()
        y = self._way.back.receive(Y_star, self.mixing.secrets, bias if fits else None)
        if y is None:
            raise not_finite()
        if bias is not None and not fits:
            y.add_(bias)
        return y, math.sqrt(self.mixing.secrets.job.squares)


class ManyRows:
    """The passage of any number of rows, on any device, in any dtype: rotated and mixed; unmixed and rotated back."""

    def __init__(self, x: Tensor, rotate: Callable[[Tensor], Tensor], turn_back: TurnBack, mixing: Mixing) -> None:
        self.mixing = mixing
        self._dtype, self._device, self._turn_back = x.dtype, x.device, turn_back
        with span("obfuscatune.mix"):
            scaled = mixing.scaled(x)
        with span("obfuscatune.rotate"):
            self._rotated = rotate(scaled)  # (n, p)

    def lay_down(self, X_star: Tensor) -> bool:
        """See `Passage`. Rows are rounded once, to the dtype that they travel in."""
        rotated = self._rotated
        as_sent = rotated.dtype == X_star.dtype and rotated.device.type == "cpu"
        mixed = X_star if as_sent else rotated.new_empty(X_star.shape)
        self.mixing.mix(rotated, mixed)
        if not as_sent:
            X_star.copy_(mixed)
        return as_sent

    def image(self, v: Tensor) -> Tensor:
        """See `Passage`."""
        return self.mixing.image(self._rotated, v)

    def take_up(self, Y_star: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, float]:
        """See `Passage`."""
        y = self.mixing.unmix(widen(Y_star.to(self._device)))
        norm = norm_of(y)
        if scale != 1:
            y.mul_(1 / scale)
        y = self.mixing.scaled_back(y)
        with span("obfuscatune.rotate"):
            return self._turn_back(y, bias, self._dtype), norm


@dataclass(frozen=True)
class Sent:
    """Rows that were sent, the reply to come, and what undoes what was done to them."""

    passage: Passage
    request: PendingProduct
    held: Held
    """The matrix that the rows were sent for."""
    check: Check | None
    """Decides whether the product, in memory of our own, is verified, and does it; None where none is."""
    mask: Mask | None = None
    """What the rows were hidden under; None without masks."""
    party: str = "worker"
    """Who was asked, as an error calls it."""


@dataclass(frozen=True)
class InFlight:
    """A crossing that was started."""

    like: Tensor
    """(0, width) of the answer, of the dtype and on the device of what was asked: the answer where no row crosses."""
    sent: Sent | None = None
    """None where no row crosses."""


class OffloadedProduct:
    """x (n, p) -> x W (n, q) for a W that lies on the worker as W_star."""

    def __init__(
        self,
        client: WorkerLink,
        held: Held,
        R_in: Transform,
        R_out: Transform,
        mixer: Mixer,
        send_in: Callable[[torch.dtype], Held] | None = None,
        observe: Observe | None = None,
        masks: LayerMasks | None = None,
    ) -> None:
        """A product with a matrix that the worker holds.

        Args:
            client, held, R_in, R_out, mixer: the worker, W_star there, and the secrets around it.
            send_in: sends W_star once more, in another dtype; None where rows always travel in the one of `held`.
            observe: called with the plain rows of each request, and whether they are for W's transpose.
            masks: what rows are hidden under; None for nothing.
        """
        self._client, self._held = client, held
        self._R_in, self._R_out = R_in, R_out
        self._mixer, self._send_in, self._observe, self._masks = mixer, send_in, observe, masks
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
            self._forget(outdated)

    def drop(self) -> None:
        """Have whoever holds the matrix forget it: nothing is multiplied by it any more."""
        self._forget(self._held)

    def _forget(self, held: Held) -> None:
        self._client.forget(held.matrix_id)
        if self._masks is not None and held.masked is not None:
            self._masks.masks.forget(held.masked.matrix_id)

    def is_coarser_than(self, dtype: torch.dtype) -> bool:
        """Whether `be_as_fine_as` of that dtype sends anything."""
        return self._send_in is not None and self._held.dtype is not None and is_finer(dtype, self._held.dtype)

    @property
    def is_computed_apart(self) -> bool:
        """Whether there is anything to be had from working on while a product is computed."""
        return self._client.computes_apart

    def start_forward(self, x: Tensor) -> InFlight:
        """Send x (n, p)."""
        return self._start(x, transpose=False)

    def finish_forward(self, crossing: InFlight, bias: Tensor | None = None) -> Tensor:
        """y = x W + b (n, q), in x's dtype and on its device; memory of its own. `bias`: b (q,), likewise.

        Raises:
            BadReply: the product is not finite. The client asks this worker nothing any more, as after the next.
            WrongProduct: it is not the product.
            WireError: see `WorkerClient.multiply`.
        """
        return self._finish(crossing, bias, transpose=False)

    def start_backward(self, g: Tensor) -> InFlight:
        """Send g (n, q)."""
        return self._start(g, transpose=True)

    def finish_backward(self, crossing: InFlight) -> Tensor:
        """dx = g Wᵀ (n, p), in g's dtype and on its device; memory of its own. Raises as `finish_forward` does."""
        return self._finish(crossing, None, transpose=True)

    def _start(self, x: Tensor, *, transpose: bool) -> InFlight:
        """Lay rows down and send them."""
        there, back = (self._R_out, self._R_in) if transpose else (self._R_in, self._R_out)
        like, held = x.new_empty(0, back.dim), self._held
        if x.shape[0] == 0:
            return InFlight(like)
        if self._observe is not None:
            self._observe(x, transpose)
        dtype = held.dtype or x.dtype
        passage = self._passage(x, dtype, transpose=transpose)
        mixing, mask, mask_size = passage.mixing, None, 0.0
        with span("obfuscatune.mix"):
            X_star = self._memory(mixing.rows, there.dim, dtype, is_sent=self._masks is None)  # (m, p)
            finite, size = passage.lay_down(X_star), mixing.size
        if self._masks is not None:
            with span("obfuscatune.mask"):
                mask_size = self._masks.deviation
                mask = self._masks.take(held.masked, x.shape[0], mixing, transpose=transpose)
                X_star = mask.hide(X_star, self._memory(mixing.rows, there.dim, torch.float64, is_sent=True))
        with span("obfuscatune.send"):
            request = self._client.submit(
                held.matrix_id, X_star, transpose=transpose, known_finite=finite, product_unchecked=True
            )
        check, party = None, "worker" if mask is None else "compute worker"
        if held.verifier is not None:
            with span("obfuscatune.verify"):
                check = held.verifier.check_for(
                    passage.image,
                    size,
                    dtype,
                    transpose=transpose,
                    party=party,
                    mask_size=mask_size,
                )
        return InFlight(like, Sent(passage, request, held, check, mask, party))

    def _memory(self, rows: int, cols: int, dtype: torch.dtype, *, is_sent: bool) -> Tensor:
        """For rows: that of the client where they are sent as they lie there, else the enclave's own."""
        return self._client.allocate(rows, cols, dtype) if is_sent else torch.empty(rows, cols, dtype=dtype)

    def _passage(self, x: Tensor, dtype: torch.dtype, *, transpose: bool) -> Passage:
        """That for few rows, where there are few and kernels for them; else that for many."""
        if x.shape[0] <= DENSE_BELOW and x.device.type == "cpu" and x.dtype == dtype:
            way = self._way(x, transpose=transpose)
            few = None if way is None else self._mixer.draw_few(x.shape[0], way.turn.dim, x.dtype)
            if way is not None and few is not None:
                with span("obfuscatune.mix"):
                    return FewRows(x, way, few)
        with span("obfuscatune.mix"):
            mixing = self._mixer.draw(*x.shape)
        if transpose:
            return ManyRows(x, self._R_out.inverse_transpose, self._turn_back_gradient, mixing)
        return ManyRows(x, self._R_in.apply, self._turn_back_product, mixing)

    def _way(self, x: Tensor, *, transpose: bool) -> FewWay | None:
        key = x.shape[0], x.dtype, transpose
        if key not in self._ways:
            there, back = (self._R_out, self._R_in) if transpose else (self._R_in, self._R_out)
            turn = there.of_few(x.shape[0], x.dtype, undo=False)
            turn_back = back.of_few(x.shape[0], x.dtype, undo=True)
            self._ways[key] = None if turn is None or turn_back is None else FewWay(turn, turn_back)
        return self._ways[key]

    def _finish(self, crossing: InFlight, bias: Tensor | None, *, transpose: bool) -> Tensor:
        """Wait for the product, verify it where it is to be verified, take it up and turn it back.

        Whatever the lot says, no product passes that is larger than rows and matrix can make it (`Verifier.bound`).
        """
        sent = crossing.sent
        if sent is None:
            return crossing.like
        with span("obfuscatune.wait"):
            Y_star = sent.request.result()  # (m, q)
        own = self._own(sent, Y_star, again=self._client.corrects)
        try:
            return self._taken_up(sent, own, bias, transpose=transpose)
        except (BadReply, WrongProduct) as error:
            verifier = sent.held.verifier
            Y_star = self._client.corrected(sent.request, error, None if verifier is None else verifier.renew)
        return self._taken_up(sent, self._own(sent, Y_star), bias, transpose=transpose)

    def _own(self, sent: Sent, Y_star: Tensor, *, again: bool = False) -> Tensor:
        """A product Y* (m, q) without its mask, out of the worker's reach where it is to be verified.

        Where some products are verified every one is copied out of the worker's reach, and only then the lot is drawn:
        a check of what the worker can still change would be none, and a copy of the checked ones alone would show.

        Args:
            again: keep what takes the mask away, for a corrected product.
        """
        if sent.mask is not None and self._masks is not None:
            with span("obfuscatune.mask"):
                dtype = sent.held.dtype or torch.float64
                return self._masks.masks.reveal(sent.mask, Y_star, dtype, again=again)
        return Y_star if sent.check is None else widen(sent.request.own(Y_star))

    def _taken_up(self, sent: Sent, Y_star: Tensor, bias: Tensor | None, *, transpose: bool) -> Tensor:
        """Verify a product where the lot falls on it, take it up and turn it back."""
        held, mixing = sent.held, sent.passage.mixing
        if sent.check is not None:
            with span("obfuscatune.verify"), self._client.refusing():
                self._client.stats.verified += sent.check(Y_star)
        with span("obfuscatune.mix"), self._client.refusing():
            y, norm = sent.passage.take_up(Y_star, bias, held.scale)  # (n, q)
            if held.verifier is not None:
                held.verifier.bound(
                    norm, y.numel(), mixing.rows, mixing.size, sent.request.dtype,
                    transpose=transpose, party=sent.party,
                )  # fmt: skip
        return y

    def _turn_back_product(self, y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if bias is not None and bias.dtype == y.dtype == dtype:
            return self._R_out.inverse_plus(y, bias)
        y = self._R_out.inverse(y).to(dtype)
        return y if bias is None else y.add_(bias)

    def _turn_back_gradient(self, y: Tensor, _bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self._R_in.apply_transpose(y).to(dtype)
