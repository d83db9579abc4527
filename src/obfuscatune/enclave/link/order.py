"""A request that works on an adapter, where `pending` has those that leave no trace on the worker.

What adds to a gradient, or takes a step, must not be done twice: such a request is sent once. Should the connection
break before its reply is there, nobody knows whether it was done, and the one way on is back to the last checkpoint.
"""

from dataclasses import dataclass

import torch

from obfuscatune.enclave.link.pending import Request
from obfuscatune.wire.dtypes import DType
from obfuscatune.wire.errors import AdapterLost, BadReply, NonFiniteError
from obfuscatune.wire.messages import NO_MATRIX, SHARED, Header, MessageType
from obfuscatune.wire.payloads import Places
from obfuscatune.wire.tensors import is_finite

RESUME = "it exists nowhere else: resume from the last checkpoint"


@dataclass(frozen=True)
class Wanted:
    """The matrix that a reply is to bring."""

    shape: tuple[int, int]
    dtype: torch.dtype


class Order(Request):
    """One such request. `WorkerLink.order` sends it and waits."""

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
        wanted: Wanted | None = None,
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
            payload_bytes=Places.BYTES if shared else self.rows.nbytes,
            reply_dtype=DType.of(self.dtype) if multiplies else DType.NONE,
            flags=self._flags | (SHARED if shared else 0),
            code=self._number,
        )

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
