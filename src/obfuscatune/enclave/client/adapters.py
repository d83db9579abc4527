"""What a worker can be asked about an adapter that it holds. All of it in its basis: nothing is transformed here."""

import itertools
import math
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from obfuscatune.enclave.client.interface import WorkerLink
from obfuscatune.enclave.client.requests import RESUME, AdapterRequest, ExpectedTensor
from obfuscatune.errors import AdapterLost, BadReply
from obfuscatune.protocol.messages import DROPOUT, LAST_NUMBER, MessageType
from obfuscatune.protocol.payloads import Attachment, Part, Step


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
