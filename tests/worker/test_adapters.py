"""Adapters on a worker on a real socket: what they compute, what is refused, whom they are kept from, when they go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from obfuscatune.protocol.limits import MAX_KEPT_FORWARDS
from obfuscatune.protocol.messages import DROPOUT, NO_MATRIX, ErrorCode, Header, MessageType
from obfuscatune.protocol.payloads import Attachment, Method, Part, Slice, Step
from obfuscatune.protocol.tensors import DType, bytes_of
from tests.worker.serving import RawClient, Serving, serving

ID, ADAPTER = bytes(range(1, 17)), bytes(range(2, 18))
P, Q, R, M = 5, 7, 2, 4
GENERATOR = torch.Generator().manual_seed(1)
W, A, B, X, G = (
    torch.randn(*shape, generator=GENERATOR, dtype=torch.float64) for shape in ((P, Q), (P, R), (R, 3), (M, P), (M, Q))
)
COLUMNS = slice(2, 5)
ONE_SLICE = Attachment(ID, (Slice(2, 3, R, 0.5, 0.0),))


@pytest.fixture
def worker(tmp_path: Path):
    with serving(tmp_path) as running:
        yield running


class Client(RawClient):
    """A raw client with a matrix stored, and words for what is asked about an adapter."""

    _request = 0

    def begin(self, attachment: Attachment = ONE_SLICE) -> Client:
        self.hello()
        header = Header(MessageType.STORE, 1_000_000, ID, DType.FLOAT64, P, Q, W.nbytes)
        assert self.ask(header, bytes_of(W))[0].type is MessageType.STORED
        assert self.attach(attachment)[0].type is MessageType.DONE
        self.put(Part.A.number(0), A)
        self.put(Part.B.number(0), B)
        return self

    def attach(self, attachment: Attachment, shape: tuple[int, int] = (P, Q)):
        body = attachment.pack()
        return self.ask(Header(MessageType.ATTACH, self.next(), ADAPTER, DType.FLOAT64, *shape, len(body)), body)

    def put(self, number: int, value: torch.Tensor):
        dtype = DType.of(value.dtype)
        header = Header(MessageType.PUT, self.next(), ADAPTER, dtype, *value.shape, value.nbytes, code=number)
        return self.ask(header, bytes_of(value))

    def fetch(self, number: int):
        return self.ask(Header(MessageType.FETCH, self.next(), ADAPTER, code=number))

    def cross(self, kind: MessageType, rows: torch.Tensor, number: int, flags: int = 0):
        dtype = DType.of(rows.dtype)
        header = Header(kind, self.next(), ADAPTER, dtype, *rows.shape, rows.nbytes, dtype, flags, number)
        return self.ask(header, bytes_of(rows))

    def step(self, **settings: float):
        step = Step(Method.SGD, 1, 0.1, 0.9, 0.999, 1e-8, 0.0, 1.0)
        return self.ask(Header(MessageType.STEP, self.next(), payload_bytes=Step.BYTES), step.pack())

    def plain(self, kind: MessageType, matrix_id: bytes = NO_MATRIX):
        return self.ask(Header(kind, self.next(), matrix_id))

    def next(self) -> int:
        self._request += 1
        return self._request


def test_forward_backward_and_a_step(worker: Serving) -> None:
    a, b, x = A.clone().requires_grad_(), B.clone().requires_grad_(), X.clone().requires_grad_()
    y = x @ W
    y = torch.cat([y[:, :2], y[:, COLUMNS] + 0.5 * x @ a @ b, y[:, 5:]], dim=1)
    y.backward(G)
    with Client(worker.address) as client:
        client.begin()
        assert torch.allclose(client.cross(MessageType.FORWARD, X, 1)[1], y.detach(), rtol=1e-12)
        assert torch.allclose(client.cross(MessageType.BACKWARD, G, 1)[1], x.grad, rtol=1e-12)
        squared = client.plain(MessageType.NORM)[1].item()
        assert squared == pytest.approx(float(a.grad.square().sum() + b.grad.square().sum()), rel=1e-12)
        client.step()
        assert torch.allclose(client.fetch(Part.A.number(0))[1], A - 0.1 * a.grad, rtol=1e-12)
        assert torch.allclose(client.fetch(Part.B.number(0))[1], B - 0.1 * b.grad, rtol=1e-12)
        client.plain(MessageType.ZERO)
        assert client.plain(MessageType.NORM)[1].item() == 0


def test_dropout_is_scaled_and_its_gradient_goes_where_it_went(worker: Serving) -> None:
    """With B = 0 but for one row, what was dropped shows in y; the backward pass must drop the same."""
    one = Attachment(ID, (Slice(0, Q, 1, 1.0, 0.5),))
    rows = torch.eye(P, dtype=torch.float64)
    with Client(worker.address) as client:
        client.hello()
        client.ask(Header(MessageType.STORE, 99, ID, DType.FLOAT64, P, Q, W.nbytes), bytes_of(torch.zeros_like(W)))
        client.attach(one)
        client.put(Part.A.number(0), torch.ones(P, 1, dtype=torch.float64))
        client.put(Part.B.number(0), torch.ones(1, Q, dtype=torch.float64))
        y = client.cross(MessageType.FORWARD, rows, 1, DROPOUT)[1]
        assert set(y.flatten().tolist()) <= {0.0, 2.0}
        passed = y[:, 0] / 2
        D = client.cross(MessageType.BACKWARD, torch.ones(P, Q, dtype=torch.float64), 1)[1]
        assert torch.equal(D.diagonal(), 2 * Q * passed)
        assert torch.equal(client.cross(MessageType.FORWARD, rows, 0)[1], torch.ones(P, Q, dtype=torch.float64))


def test_another_session_s_adapter_is_as_none_at_all(worker: Serving) -> None:
    with Client(worker.address, b"\x01" * 32) as owner, Client(worker.address, b"\x02" * 32) as other:
        owner.begin()
        owner.cross(MessageType.FORWARD, X, 1)
        other.hello()
        words = set()
        for header, text in (
            other.fetch(Part.A.number(0)),
            other.put(Part.A.number(0), A),
            other.cross(MessageType.FORWARD, X, 1),
            other.cross(MessageType.BACKWARD, G, 1),
            other.step(),
            other.plain(MessageType.ZERO),
            other.plain(MessageType.NORM),
        ):
            assert (header.type, header.code) == (MessageType.ERROR, ErrorCode.UNKNOWN_ADAPTER)
            words.add(bytes(text))
        assert len(words) == 1
        assert other.plain(MessageType.FORGET, ADAPTER)[0].type is MessageType.DONE
        assert other.attach(ONE_SLICE)[0].code == ErrorCode.UNKNOWN_MATRIX
        assert torch.equal(owner.fetch(Part.A.number(0))[1], A)
        assert owner.cross(MessageType.BACKWARD, G, 1)[0].type is MessageType.PRODUCT


def test_what_does_not_fit(worker: Serving) -> None:
    with Client(worker.address) as client:
        client.begin()
        for header, _ in (
            client.attach(ONE_SLICE, (P + 1, Q)),
            client.put(Part.A.number(0), B),
            client.put(Part.A.number(0), A.float()),
            client.put(Part.A.number(1), A),
            client.fetch(Part.B.number(1)),
            client.cross(MessageType.FORWARD, G, 1),
            client.cross(MessageType.BACKWARD, X, 1),
        ):
            assert (header.type, header.code) == (MessageType.ERROR, ErrorCode.SHAPE)
        assert client.cross(MessageType.FORWARD, X, 1)[0].type is MessageType.PRODUCT
        assert client.cross(MessageType.BACKWARD, G[:2], 1)[0].code == ErrorCode.SHAPE


def test_a_backward_pass_comes_once(worker: Serving) -> None:
    with Client(worker.address) as client:
        client.begin()
        client.cross(MessageType.FORWARD, X, 1)
        assert client.cross(MessageType.BACKWARD, G, 1)[0].type is MessageType.PRODUCT
        assert client.cross(MessageType.BACKWARD, G, 1)[0].code == ErrorCode.UNKNOWN_ADAPTER
        client.cross(MessageType.FORWARD, X, 2)
        client.plain(MessageType.ZERO)
        assert client.cross(MessageType.BACKWARD, G, 2)[0].code == ErrorCode.UNKNOWN_ADAPTER


def test_what_is_kept_is_bounded_and_given_back(worker: Serving) -> None:
    with Client(worker.address) as client:
        client.begin()
        before = worker.store.held_bytes
        for number in range(1, MAX_KEPT_FORWARDS + 10):
            client.cross(MessageType.FORWARD, X, number)
        assert worker.store.held_bytes - before == MAX_KEPT_FORWARDS * (X.nbytes + M * R * 8)
        assert client.cross(MessageType.BACKWARD, G, 1)[0].code == ErrorCode.UNKNOWN_ADAPTER
        client.plain(MessageType.ZERO)
        assert worker.store.held_bytes == before
        client.attach(ONE_SLICE)  # in place of the other
        assert worker.store.held_bytes == before
        client.plain(MessageType.FORGET, ADAPTER)
        assert worker.store.held_bytes == W.nbytes
        client.attach(ONE_SLICE)
        client.plain(MessageType.FORGET)
        assert worker.store.held_bytes == 0


def test_the_quota_counts_adapters(tmp_path: Path) -> None:
    wide = Attachment(ID, (Slice(0, Q, 4096, 1.0, 0.0),))
    with serving(tmp_path, quota_bytes=4000) as worker, Client(worker.address) as client:
        client.begin()
        assert client.attach(wide)[0].code == ErrorCode.QUOTA
        client.attach(ONE_SLICE)
        codes = [client.cross(MessageType.FORWARD, X, number)[0].code for number in range(1, 40)]
        assert ErrorCode.QUOTA in codes
        assert worker.store.held_bytes <= 4000


def test_a_norm_that_is_not_finite_does_not_cross(worker: Serving) -> None:
    with Client(worker.address) as client:
        client.begin()
        client.cross(MessageType.FORWARD, X * 1e200, 1)
        client.cross(MessageType.BACKWARD, G * 1e200, 1)
        assert client.plain(MessageType.NORM)[1].item() == -1


@pytest.mark.parametrize(
    "attachment",
    [
        Attachment(ID, (Slice(0, Q + 1, 1, 1.0, 0.0),)),
        Attachment(ID, (Slice(0, 3, 1, 1.0, 0.0), Slice(2, 3, 1, 1.0, 0.0))),
        Attachment(ID, (Slice(0, 0, 1, 1.0, 0.0),)),
        Attachment(ID, (Slice(0, 3, 0, 1.0, 0.0),)),
        Attachment(ID, (Slice(0, 3, 1, float("inf"), 0.0),)),
        Attachment(ID, (Slice(0, 3, 1, 1.0, -0.1),)),
    ],
)
def test_a_malformed_attachment_ends_the_connection(worker: Serving, attachment: Attachment) -> None:
    with Client(worker.address) as client:
        client.begin()
        assert client.attach(attachment)[0].code == ErrorCode.MALFORMED
        assert client.at_end()
