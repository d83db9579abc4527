"""What was asked of a worker and has no answer yet, and how to make again what it lacks.

A `ProductRequest` leaves no trace on the worker and is sent again after a failure. An `AdapterRequest` adds to a
gradient or takes a step, which must not be done twice: it is sent once. Should the connection break before its reply is
there, nobody knows whether it was done, and the one way on is back to the last checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from obfuscatune.errors import (
    AdapterLost,
    BadReply,
    ConfigError,
    LimitExceeded,
    MalformedMessage,
    NonFiniteError,
    WireError,
)
from obfuscatune.protocol.limits import MAX_DIM, MAX_JOINED, MAX_MATRIX_BYTES, MAX_WINDOW_BYTES
from obfuscatune.protocol.messages import NO_MATRIX, SHARED, TRANSPOSED, Header, MessageType
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
        product = torch.empty(*self.shape, dtype=self.dtype) if self.output is None else self.output
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
    ) -> None:
        inner, outer = matrix.shape[::-1] if transpose else matrix.shape
        check_rows(rows, inner)
        matrix_id, shape = matrix.matrix_id, (rows.shape[0], outer)
        super().__init__(matrix_id, matrix_id, rows, shape, dtype, product_unchecked=product_unchecked)
        self.transpose = transpose
        self._wait = wait

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


RESUME = "it exists nowhere else: resume from the last checkpoint"


@dataclass(frozen=True)
class ExpectedTensor:
    """The matrix that a reply is to bring."""

    shape: tuple[int, int]
    dtype: torch.dtype


class AdapterRequest(Request):
    """One such request. `WorkerClient.order` sends it and waits."""

    def __init__(
        self,
        kind: MessageType,
        adapter_id: bytes = NO_MATRIX,
        *,
        rows: torch.Tensor | None = None,
        body: bytes = b"",
        like: tuple[torch.dtype, int, int] | None = None,
        needs: bytes = NO_MATRIX,
        number: int = 0,
        flags: int = 0,
        wanted: ExpectedTensor | None = None,
        once: bool = False,
        known_finite: bool = False,
        product_unchecked: bool = False,
    ) -> None:
        """What to ask.

        Args:
            kind: one of `wire.messages.ON_ADAPTERS`.
            adapter_id: which adapter; zeros for all.
            rows: the matrix to send, contiguous and on the CPU.
            body: what to send where it is no matrix.
            like: dtype and shape that the header states where no matrix is sent.
            needs: the matrix that the worker must hold, to be uploaded again should it lack it.
            number: of a part, or of a forward pass.
            flags: of the header.
            wanted: what comes back; None for no more than that it was done.
            once: it must not be done twice.
            known_finite: the caller has made sure that `rows` contain neither NaN nor infinity.
            product_unchecked: it will make sure of what comes back.

        Raises:
            NonFiniteError: `rows` contain NaN or infinity.
        """
        if rows is not None and not known_finite and not is_finite(rows):
            raise NonFiniteError(
                f"what {kind.name} was to send contains NaN or infinity; it was not sent. "
                "Lower the learning rate, or compute in a wider dtype"
            )
        if rows is None:
            rows = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(0, dtype=torch.uint8)
        else:
            like = rows.dtype, rows.shape[0], rows.shape[1]
        shape, dtype = ((0, 0), torch.float64) if wanted is None else (wanted.shape, wanted.dtype)
        super().__init__(adapter_id, needs, rows, shape, dtype, product_unchecked=product_unchecked)
        self._kind, self._like = kind, like
        self._number, self._flags = number, flags
        self._wanted, self._once = wanted, once
        self._is_done = False

    @property
    def done(self) -> bool:
        """Whether it was answered, one way or the other."""
        return self._is_done or super().done

    def header(self, request_id: int, *, shared: bool = False) -> Header:
        """The message that asks for it, with what it sends as payload or in shared memory."""
        dtype, rows, cols = (DType.NONE, 0, 0) if self._like is None else (DType.of(self._like[0]), *self._like[1:])
        multiplies = self._kind in (MessageType.FORWARD, MessageType.BACKWARD)
        return Header(
            self._kind,
            request_id,
            self.matrix_id,
            dtype,
            rows=rows,
            cols=cols,
            payload_bytes=Places.BYTES if shared else self.nbytes,
            reply_dtype=DType.of(self.dtype) if multiplies else DType.NONE,
            flags=self._flags | (SHARED if shared else 0),
            code=self._number,
        )

    def expect(self, request_id: int) -> None:
        """See `Request`; most are answered by no matrix."""
        if self._wanted is not None:
            super().expect(request_id)

    def interrupted(self) -> None:
        """The connection that it was sent on is lost: what must not be done twice is given up."""
        if self._once and not self.done:
            self.error = AdapterLost(
                f"the connection broke before the worker had answered {self._kind.name}; whether the adapter that it "
                f"holds was changed is not known, and {RESUME}"
            )

    def acknowledged(self, header: Header) -> None:
        """DONE came for it.

        Raises:
            BadReply: a matrix was asked for, or it is about another adapter.
        """
        if self._wanted is not None or header.matrix_id != self.matrix_id:
            raise BadReply(f"{header.type.name} came, which does not answer {self._kind.name}")
        self._is_done = True
