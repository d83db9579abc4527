"""What was asked of a worker and has no answer yet, and how to make again what it lacks.

A `ProductRequest` leaves no trace on the worker and is sent again after a failure. `adapters` has those that leave one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from obfuscatune.errors import (
    BadReply,
    ConfigError,
    LimitExceeded,
    MalformedMessage,
    NonFiniteError,
    WireError,
)
from obfuscatune.protocol.limits import MAX_DIM, MAX_JOINED, MAX_MATRIX_BYTES, MAX_WINDOW_BYTES
from obfuscatune.protocol.messages import SHARED, TRANSPOSED, Header, MessageType
from obfuscatune.protocol.payloads import NO_DIGEST, NUMBER_BYTES, Offer, Places
from obfuscatune.protocol.tensors import DType, bytes_of, content_digest, is_finite, weight_digest
from obfuscatune.protocol.transport import NEVER

MatrixSource = Callable[[], torch.Tensor]
"""Makes W_star (p, q) again, contiguous, on the CPU. Called only when the worker lacks it."""

NO_BYTES = memoryview(b"")


@dataclass
class StoredMatrix:
    """W_star as the link remembers it: not its elements, but how to have them again."""

    matrix_id: bytes
    source: MatrixSource
    shape: tuple[int, int]
    dtype: torch.dtype
    at_hand: torch.Tensor | None = None
    """W_star itself, until it is uploaded."""
    widths: tuple[int, ...] = ()
    """Columns of each published weight, where W_star is nothing but such weights side by side."""
    digest: bytes = NO_DIGEST
    weights: tuple[bytes, ...] = ()
    """Digests of the published weights, once a worker wanted them."""
    refused: WireError | None = None
    """Why the worker would not take it."""

    def __post_init__(self) -> None:
        size = self.nbytes
        if len(self.matrix_id) != 16 or not any(self.matrix_id):
            raise ConfigError("a matrix id has 16 bytes, not all of them zero")
        if min(self.shape) < 1 or max(self.shape) > MAX_DIM or size > MAX_MATRIX_BYTES:
            raise LimitExceeded(
                f"a matrix of {self.shape[0]} x {self.shape[1]} ({size} bytes): 1 to {MAX_DIM} either way and "
                f"{MAX_MATRIX_BYTES} bytes go over the wire"
            )

    def offer(self, request_id: int, *, digest: bool, weights: bool) -> tuple[Header, bytes]:
        """The OFFER of this matrix and its payload: with its digest, and with those of its weights, where wanted."""
        weights = weights and 0 < len(self.widths) <= MAX_JOINED
        if digest and self.digest == NO_DIGEST:
            self.digest = content_digest(self.elements())
        if weights and not self.weights:
            self.weights = tuple(weight_digest(W) for W in self.elements().split(list(self.widths), dim=1))
        body = Offer(self.digest if digest else NO_DIGEST, self.weights if weights else ()).pack()
        dtype = DType.of(self.dtype)
        return Header(MessageType.OFFER, request_id, self.matrix_id, dtype, *self.shape, payload_bytes=len(body)), body

    def store(self, request_id: int, *, shared: bool) -> Header:
        """The STORE of this matrix, with its elements as payload or in shared memory."""
        size = NUMBER_BYTES if shared else self.nbytes
        flags = SHARED if shared else 0
        dtype = DType.of(self.dtype)
        return Header(
            MessageType.STORE, request_id, self.matrix_id, dtype, *self.shape, payload_bytes=size, flags=flags
        )

    @property
    def nbytes(self) -> int:
        """Of W_star."""
        return self.shape[0] * self.shape[1] * DType.of(self.dtype).itemsize

    def elements(self) -> torch.Tensor:
        """W_star (p, q), contiguous, on the CPU.

        Raises:
            ConfigError: its source made something else.
            NonFiniteError: it contains NaN or infinity.
        """
        tensor = self.source() if self.at_hand is None else self.at_hand
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise ConfigError(
                f"a matrix of {self.shape} {self.dtype} was announced, "
                f"its source made {tuple(tensor.shape)} {tensor.dtype}"
            )
        if not is_finite(tensor):
            raise NonFiniteError(f"a protected matrix of {self.shape} contains NaN or infinity; it was not sent")
        return tensor


class Awaited(NamedTuple):
    """The one product that answers a request as it was sent."""

    header: bytes
    """The 56 bytes that it must begin with: request, matrix, shape, dtype, and the way in which it comes."""
    product: torch.Tensor
    """Where it lies then: in shared memory, or in memory of the enclave's own."""
    payload: memoryview
    """What is received: the bytes of `product`; none of them where that is in shared memory."""


class Request:
    """What a link sends and waits for; the link fills in what became of it.

    A subclass says how it is put, and what answers it beside a matrix or an error.
    """

    def __init__(
        self,
        matrix_id: bytes,
        needs: bytes,
        rows: torch.Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        product_unchecked: bool,
    ) -> None:
        """A request that was not sent yet.

        Args:
            matrix_id: what it is about: a matrix, or an adapter.
            needs: the matrix that the worker must hold for it.
            rows: what is sent; contiguous, on the CPU.
            shape: of the matrix that is to come back.
            dtype: of that.
            product_unchecked: the caller looks for NaN and infinity itself.
        """
        self.matrix_id, self.needs = matrix_id, needs
        self.rows, self.nbytes = rows, rows.nbytes
        self.shape, self.dtype = shape, dtype
        self.product_unchecked = product_unchecked
        self.deadline = NEVER
        """Of the sending that is under way."""
        self.times_sent = self.times_unknown = 0
        self.output: torch.Tensor | None = None
        """Where in shared memory the product is to lie, for the sending that is under way."""
        self.awaited: Awaited | None = None
        """The product that may come, for the sending that is under way; None where none may."""
        self.product: torch.Tensor | None = None
        self.error: WireError | None = None

    @property
    def done(self) -> bool:
        """Whether it was answered, one way or the other."""
        return self.product is not None or self.error is not None

    def header(self, request_id: int, *, shared: bool = False) -> Header:
        """The message that asks for it, with `rows` as payload or in shared memory."""
        raise NotImplementedError

    def expect(self, request_id: int) -> None:
        """It was sent: have all ready for its product while the worker computes."""
        product = self.memory() if self.output is None else self.output
        payload = bytes_of(product) if self.output is None else NO_BYTES
        header = Header(
            MessageType.PRODUCT,
            request_id,
            self.matrix_id,
            DType.of(self.dtype),
            *self.shape,
            payload_bytes=len(payload),
            flags=0 if self.output is None else SHARED,
        )
        self.awaited = Awaited(header.pack(), product, payload)

    def memory(self) -> torch.Tensor:
        """The enclave's own, for the product."""
        return torch.empty(*self.shape, dtype=self.dtype)

    def other_product(self, header: Header) -> BadReply:
        """What to say of a PRODUCT that answers it and is not the one that it awaits."""
        shape, dtype = self.shape, DType.of(self.dtype)
        if (header.matrix_id, header.rows, header.cols, header.dtype) == (self.matrix_id, *shape, dtype):
            return BadReply("the product was to come through shared memory, or was not, and came the other way")
        return BadReply(
            f"expected a product of {shape[0]} x {shape[1]} {dtype.name}, the worker sent "
            f"{header.rows} x {header.cols} {header.dtype.name}"
            + ("" if header.matrix_id == self.matrix_id else " of another matrix")
        )

    def interrupted(self) -> None:
        """The connection that it was sent on is lost: as it stands, it may be sent again."""

    def acknowledged(self, header: Header) -> None:
        """DONE came for it.

        Raises:
            MalformedMessage: a matrix was asked for.
        """
        raise MalformedMessage(f"{header.type.name} came, which does not answer MULTIPLY")


class ProductRequest(Request):
    """A product of a stored matrix; `result` waits for it."""

    def __init__(
        self,
        matrix: StoredMatrix,
        rows: torch.Tensor,
        transpose: bool,
        dtype: torch.dtype,
        wait: Callable[["ProductRequest"], None],
        product_unchecked: bool = False,
        into: torch.Tensor | None = None,
    ) -> None:
        """A product that was not asked for yet.

        Args:
            matrix: what the rows are multiplied by.
            rows: (m, p), or (m, q) when `transpose`; contiguous, on the CPU.
            transpose: multiply by the transpose.
            dtype: of the product.
            wait: returns once it is answered.
            product_unchecked: the caller looks for NaN and infinity itself.
            into: memory of the enclave's own for the product, where that is not in shared memory; None for new.
        """
        inner, outer = matrix.shape[::-1] if transpose else matrix.shape
        check_rows(rows, inner)
        matrix_id, shape = matrix.matrix_id, (rows.shape[0], outer)
        super().__init__(matrix_id, matrix_id, rows, shape, dtype, product_unchecked=product_unchecked)
        self.transpose = transpose
        self._matrix, self._wait, self._into = matrix, wait, into

    def header(self, request_id: int, *, shared: bool = False) -> Header:
        """See `Request`: MULTIPLY."""
        return Header(
            MessageType.MULTIPLY,
            request_id,
            self.matrix_id,
            DType.of(self.rows.dtype),
            rows=self.rows.shape[0],
            cols=self.rows.shape[1],
            payload_bytes=Places.BYTES if shared else self.nbytes,
            reply_dtype=DType.of(self.dtype),
            flags=(TRANSPOSED if self.transpose else 0) | (SHARED if shared else 0),
        )

    def in_parts(self, count: int) -> list["ProductRequest"]:
        """So many requests that ask for the same together, each for some of the rows, in their order."""
        if count == 1:
            return [self]
        if self._into is None:
            self._into = super().memory()
        parts = zip(self.rows.tensor_split(count), self._into.tensor_split(count), strict=True)
        how = self.transpose, self.dtype, self._wait, self.product_unchecked
        return [ProductRequest(self._matrix, rows, *how, into) for rows, into in parts]

    def memory(self) -> torch.Tensor:
        """See `Request`."""
        return super().memory() if self._into is None else self._into

    def result(self) -> torch.Tensor:
        """Wait for the product: (m, q), or (m, p) when transposed; on the CPU, contiguous.

        The caller's own; but where the rows came from `WorkerClient.allocate`, it may lie in memory that the worker can
        still write to: compute from it once, into memory of one's own.

        Raises:
            WireError: see `WorkerClient.multiply`.
        """
        self._wait(self)
        if self.error is not None:
            raise self.error
        if self.product is None:
            raise ConfigError("this request was given up; submit it again")
        return self.product

    def own(self, product: torch.Tensor) -> torch.Tensor:
        """What `result` returned, where the worker cannot write to it: a copy, where it lies in shared memory."""
        return product.clone() if product is self.output else product


class ProductInParts:
    """A product that is asked for part by part: while the worker multiplies one, others are on the way.

    The worker sees the rows that it would see in one request, in the same order.
    """

    def __init__(self, whole: ProductRequest, parts: list[ProductRequest]) -> None:
        """The parts are those that `whole.in_parts` made."""
        self.rows, self.dtype = whole.rows, whole.dtype
        self._product, self._parts = whole.memory(), parts

    def result(self) -> torch.Tensor:
        """As `ProductRequest.result`, of all rows; in memory of the enclave's own."""
        for part in self._parts:
            part.result()
        return self._product

    def own(self, product: torch.Tensor) -> torch.Tensor:
        """What `result` returned: nobody else can write to it."""
        return product


def check_rows(rows: torch.Tensor, inner: int) -> None:
    if rows.dim() != 2 or rows.shape[0] < 1 or rows.shape[1] != inner:
        raise ConfigError(f"expected rows of (m, {inner}), got {tuple(rows.shape)}")
    if not rows.is_cpu or not rows.is_contiguous():
        raise ConfigError("rows must be contiguous and on the CPU: they are sent from where they lie")
    if rows.shape[0] > MAX_DIM or rows.nbytes > MAX_WINDOW_BYTES:
        raise LimitExceeded(
            f"{rows.shape[0]} rows ({rows.nbytes} bytes) in one call: split it, the wire takes {MAX_WINDOW_BYTES} bytes"
        )


def check_product(product: torch.Tensor, party: str = "worker") -> torch.Tensor:
    """The product of that party, as an error calls it, where it is finite.

    Raises:
        BadReply: it contains NaN or infinity.
    """
    if not is_finite(product):
        raise not_finite(party)
    return product


def not_finite(party: str = "worker") -> BadReply:
    """The error for a product of that party that contains NaN or infinity."""
    return BadReply(f"the {party}'s product contains NaN or infinity, although all that was sent is finite")


def check_finite(rows: torch.Tensor) -> None:
    """Nothing that is not finite crosses.

    Raises:
        NonFiniteError: `rows` contain NaN or infinity.
    """
    if not is_finite(rows):
        raise NonFiniteError(
            "the rows to be multiplied contain NaN or infinity; they were not sent. "
            "Lower the learning rate, or compute in a wider dtype"
        )
