"""What a worker can be asked about an adapter that it holds. All of it in its basis: nothing is transformed here.

An `AdapterRequest` adds to a gradient or takes a step, which must not be done twice: it is sent once. Should the
connection break before its reply is there, nobody knows whether it was done, and the one way on is back to the last
checkpoint.
"""

import itertools
import math
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from obfuscatune.enclave.client.interface import WorkerLink
from obfuscatune.enclave.client.requests import Request
from obfuscatune.errors import AdapterLost, BadReply, NonFiniteError
from obfuscatune.protocol.messages import DROPOUT, LAST_NUMBER, NO_MATRIX, SHARED, Header, MessageType
from obfuscatune.protocol.payloads import Attachment, Part, Places, Step
from obfuscatune.protocol.tensors import DType, is_finite

RESUME = "it exists nowhere else: resume from the last checkpoint"


@dataclass(frozen=True)
class ExpectedTensor:
    """The matrix that a reply is to bring."""

    shape: tuple[int, int]
    dtype: torch.dtype


class AdapterRequest(Request):
    """One request about an adapter. `WorkerClient.order` sends it and waits."""

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


class AdapterClient:
    """One adapter on the worker: of the matrix (p, q) that it is attached to, with one slice or more."""

    _numbers = itertools.count(1)

    def __init__(self, client: WorkerLink, attachment: Attachment, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Have the worker make room for it; factors and moments are zero until `put`.

        Args:
            link: to the worker that holds the matrix.
            attachment: the matrix, and LoRA's settings for each slice of its columns.
            shape: of the matrix.
            dtype: of the factors.

        Raises:
            QuotaExceeded: the worker has no room.
            WireError: see `WorkerClient.multiply`.
        """
        self._client, self._attachment = client, attachment
        self._shape, self._dtype = shape, dtype
        self.adapter_id = secrets.token_bytes(16)
        self._ask(
            AdapterRequest(
                MessageType.ATTACH,
                self.adapter_id,
                body=attachment.pack(),
                like=(dtype, *shape),
                needs=attachment.matrix_id,
            )
        )

    def put(self, index: int, part: Part, value: torch.Tensor) -> None:
        """Set one matrix of slice `index`."""
        value = value.to("cpu", self._dtype).contiguous()
        self._ask(AdapterRequest(MessageType.PUT, self.adapter_id, rows=value, number=part.number(index)))

    def fetch(self, index: int, part: Part) -> torch.Tensor:
        """One matrix of slice `index`."""
        it = self._attachment.slices[index]
        of_A = part in (Part.A, Part.A_FIRST, Part.A_SECOND)
        shape = (self._shape[0], it.rank) if of_A else (it.rank, it.width)
        wanted = ExpectedTensor(shape, self._dtype)
        return self._matrix(
            AdapterRequest(MessageType.FETCH, self.adapter_id, number=part.number(index), wanted=wanted)
        )

    def allocate(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for rows that are to be sent; see `WorkerClient.allocate`."""
        return self._client.allocate(rows, cols, dtype)

    def forward(self, rows: torch.Tensor, *, number: int, dropout: bool, known_finite: bool = False) -> torch.Tensor:
        """rows W* plus the adapter's part: (m, p) -> (m, q), see `Pending.result` for whose memory that is.

        Neither this nor what `backward` returns is looked at for NaN and infinity: that is the caller's, in memory of
        its own.

        Args:
            rows: (m, p), contiguous, on the CPU.
            number: under which to keep what the backward pass needs, of `new_number`; 0 keeps nothing.
            dropout: whether the worker is to draw the slices' dropout.
            known_finite: the caller has made sure that `rows` contain neither NaN nor infinity.
        """
        return self._matrix(
            AdapterRequest(
                MessageType.FORWARD,
                self.adapter_id,
                rows=rows,
                needs=self._attachment.matrix_id,
                number=number,
                flags=DROPOUT if dropout else 0,
                wanted=ExpectedTensor((rows.shape[0], self._shape[1]), rows.dtype),
                known_finite=known_finite,
                product_unchecked=True,
            )
        )

    def backward(self, rows: torch.Tensor, *, number: int, known_finite: bool = False) -> torch.Tensor:
        """Gradients (m, q) of forward pass `number` -> those of its rows (m, p); the factors' are added up there."""
        return self._matrix(
            AdapterRequest(
                MessageType.BACKWARD,
                self.adapter_id,
                rows=rows,
                needs=self._attachment.matrix_id,
                number=number,
                wanted=ExpectedTensor((rows.shape[0], self._shape[0]), rows.dtype),
                once=True,
                known_finite=known_finite,
                product_unchecked=True,
            )
        )

    def refusing(self) -> AbstractContextManager[None]:
        """Within it what came is judged; see `WorkerClient.refusing`."""
        return self._client.refusing()

    def forget(self) -> None:
        """Have the worker drop it."""
        self._ask(AdapterRequest(MessageType.FORGET, self.adapter_id))

    @classmethod
    def new_number(cls) -> int:
        """For a forward pass; not used before in this process, nor soon again."""
        return next(cls._numbers) % LAST_NUMBER + 1

    def _ask(self, order: AdapterRequest) -> None:
        with _told():
            self._client.order(order)

    def _matrix(self, order: AdapterRequest) -> torch.Tensor:
        with _told():
            matrix = self._client.order(order)
        if matrix is None:
            raise BadReply("the worker answered without the matrix that was asked for")
        return matrix


def step_all(client: WorkerLink, step: Step) -> None:
    """Have every adapter of the session take one step."""
    with _told():
        client.order(AdapterRequest(MessageType.STEP, body=step.pack(), once=True))


def zero_all(client: WorkerLink) -> None:
    """Set every gradient of the session's adapters to zero."""
    with _told():
        client.order(AdapterRequest(MessageType.ZERO))


def gradient_norm(client: WorkerLink) -> float:
    """Of all gradients of the session's adapters together; NaN where one is not finite."""
    with _told():
        answer = client.order(AdapterRequest(MessageType.NORM, wanted=ExpectedTensor((1, 1), torch.float64)))
    squared = math.nan if answer is None else float(answer)
    return math.sqrt(squared) if squared >= 0 else math.nan


@contextmanager
def _told() -> Iterator[None]:
    """Say what is to be done about an adapter that is gone."""
    try:
        yield
    except AdapterLost as error:
        if RESUME in str(error):
            raise
        raise AdapterLost(f"{error}: the worker was restarted or dropped it, and {RESUME}") from error
