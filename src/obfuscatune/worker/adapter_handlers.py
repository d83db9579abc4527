"""From a request that works on an adapter to its reply; beside `answer`, which has those that leave no trace."""

import secrets
from collections.abc import Callable

import torch

from obfuscatune.backend import Computer
from obfuscatune.protocol.messages import DROPOUT, NO_MATRIX, ErrorCode, MessageType
from obfuscatune.protocol.payloads import Attachment, Step
from obfuscatune.worker.adapters import Adapter, AdapterStore
from obfuscatune.worker.buffers import Buffers, MatrixBuffer
from obfuscatune.worker.lora import Kept, add_backward, add_forward
from obfuscatune.worker.quota import SessionKey
from obfuscatune.worker.replies import Reply, Request, RequestError, product_of, room_for, short
from obfuscatune.worker.sessions import Turns
from obfuscatune.worker.store import MatrixStore

NOT_FINITE = -1.0
"""In the place of a norm that is NaN or infinite, for such a number must not cross."""

Handler = Callable[[SessionKey, Request, Buffers], Reply]


class AdapterAnswerer:
    """Answers what `wire.messages.ON_ADAPTERS` asks. Its errors are turned into refusals by `Answerer`."""

    def __init__(self, store: MatrixStore, computer: Computer, turns: Turns) -> None:
        self._store, self._computer, self._turns = store, computer, turns
        self.adapters = AdapterStore(store, computer.device)
        self._dropout = torch.Generator(computer.device).manual_seed(secrets.randbits(63))
        self.answers: dict[MessageType, Handler] = {
            MessageType.ATTACH: self._attach,
            MessageType.PUT: self._put,
            MessageType.FETCH: self._fetch,
            MessageType.FORWARD: self._forward,
            MessageType.BACKWARD: self._backward,
            MessageType.STEP: self._step,
            MessageType.ZERO: self._zero,
            MessageType.NORM: self._norm,
        }

    def _attach(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        header = request.header
        attachment = Attachment.unpack(request.body, header.cols)
        matrix = self._store.get((session, attachment.matrix_id))
        if tuple(matrix.shape) != (header.rows, header.cols):
            raise RequestError(
                ErrorCode.SHAPE,
                f"the matrix is {matrix.shape[0]} x {matrix.shape[1]}, not {header.rows} x {header.cols}",
            )
        key = (session, header.matrix_id)
        self.adapters.attach(key, attachment, (header.rows, header.cols), header.dtype.torch_dtype)
        return short(MessageType.DONE, header)

    def _put(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        adapter = self._adapter(session, request)
        part, given = adapter.part(request.header.code), request.matrix()
        if part.shape != given.shape or part.dtype != given.dtype:
            raise RequestError(
                ErrorCode.SHAPE,
                f"this part is {tuple(part.shape)} {part.dtype}, {tuple(given.shape)} {given.dtype} came",
            )
        with adapter.lock:
            part.copy_(given)
        return short(MessageType.DONE, request.header)

    def _fetch(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        adapter = self._adapter(session, request)
        part = adapter.part(request.header.code)
        out = buffers.allocate(part.shape[0], part.shape[1], part.dtype)
        with adapter.lock:
            out.matrix.copy_(part)
        return product_of(request, out)

    def _forward(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        header = request.header
        adapter = self._adapter(session, request)
        W = self._store.get((session, adapter.attachment.matrix_id))
        out = self._room(request, adapter, buffers, transpose=False)
        dropout = self._dropout if header.flags & DROPOUT else None
        with self._turns.of(session.peer), self._computer.turn() as device, adapter.lock:
            rows = request.matrix().to(device)
            x = rows.to(adapter.dtype, copy=bool(header.code))  # the buffer that it lies in is used again
            y = torch.mm(rows.to(W.dtype), W)
            kept: Kept = add_forward(x, y, adapter.factors, dropout)
            out.matrix.copy_(y)
        if header.code:
            adapter.remember(header.code, kept)
        return product_of(request, out)

    def _backward(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        header = request.header
        adapter = self._adapter(session, request)
        W = self._store.get((session, adapter.attachment.matrix_id))
        out = self._room(request, adapter, buffers, transpose=True)
        kept = adapter.take(header.code)
        if kept.x.shape[0] != header.rows:
            raise RequestError(
                ErrorCode.SHAPE, f"that forward pass had {kept.x.shape[0]} rows, its gradient has {header.rows}"
            )
        with self._turns.of(session.peer), self._computer.turn() as device, adapter.lock:
            rows = request.matrix().to(device)
            dx = torch.mm(rows.to(W.dtype), W.t())
            add_backward(rows.to(adapter.dtype), dx, adapter.factors, kept)
            out.matrix.copy_(dx)
        return product_of(request, out)

    def _step(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        settings = Step.unpack(request.body)
        for adapter in self._named(session, request):
            with self._turns.of(session.peer):
                adapter.step(settings)
        return short(MessageType.DONE, request.header)

    def _zero(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        for adapter in self._named(session, request):
            adapter.zero()
        return short(MessageType.DONE, request.header)

    def _norm(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        total = sum(adapter.squared_norm() for adapter in self._named(session, request))
        out = buffers.allocate(1, 1, torch.float64)
        out.matrix.fill_(total if total < float("inf") else NOT_FINITE)
        return product_of(request, out)

    def _adapter(self, session: SessionKey, request: Request) -> Adapter:
        return self.adapters.get((session, request.header.matrix_id))

    def _named(self, session: SessionKey, request: Request) -> list[Adapter]:
        key = (session, request.header.matrix_id)
        return self.adapters.named(key, every=request.header.matrix_id == NO_MATRIX)

    def _room(self, request: Request, adapter: Adapter, buffers: Buffers, *, transpose: bool) -> MatrixBuffer:
        """Memory for a product, once it is known that the rows fit and the product may be sent."""
        inner, outer = adapter.shape[::-1] if transpose else adapter.shape
        if request.header.cols != inner:
            raise RequestError(ErrorCode.SHAPE, f"rows have {request.header.cols} columns, the matrix takes {inner}")
        return room_for(request, outer, buffers)
