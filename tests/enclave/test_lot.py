"""Which products are checked is decided when they are out of the worker's reach, and a worker is refused once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from obfuscatune.enclave.client import ProductRequest, RetryPolicy, WorkerClient
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixing import KroneckerMixer
from obfuscatune.enclave.product import Held, OffloadedProduct
from obfuscatune.enclave.verification import Verifier
from obfuscatune.errors import BadReply, WireError, WrongProduct
from tests.enclave.client.peers import MemoryWorker
from tests.enclave.test_hostile_numbers import ID, Offloaded, P, Q, protected
from tests.worker.serving import SECONDS, serving

OTHER = b"2" * 16
F32 = torch.float32


def product_over(client: WorkerClient, share: float) -> OffloadedProduct:
    R_in, R_out, W_star = protected(F32)
    client.store(ID, lambda: W_star, shape=(P, Q), dtype=F32)
    verifier = Verifier(W_star, SecretStream.fresh(), share)
    return OffloadedProduct(client, Held(ID, verifier=verifier), R_in, R_out, KroneckerMixer(8, SecretStream.fresh()))


def noted(monkeypatch: pytest.MonkeyPatch, events: list[str]) -> None:
    """Write down in which order requests are sent, products come, and checks are drawn and prepared."""
    for kind, name in ((WorkerClient, "submit"), (ProductRequest, "result"), (ProductRequest, "own")):
        _note(monkeypatch, events, kind, name)
    for name in ("_is_drawn", "probe"):
        _note(monkeypatch, events, Verifier, name)


def _note(monkeypatch: pytest.MonkeyPatch, events: list[str], kind: type, name: str) -> None:
    honest = getattr(kind, name)

    def method(self: Any, *args: Any, **how: Any) -> Any:
        found = honest(self, *args, **how)
        events.append(name)
        return found

    monkeypatch.setattr(kind, name, method)


@pytest.mark.parametrize("rows", [1, 200], ids=["few", "many"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_nothing_of_a_check_by_lot_is_computed_before_the_product_is_ours(
    monkeypatch: pytest.MonkeyPatch, rows: int, backward: bool
) -> None:
    client = WorkerClient(MemoryWorker())
    product = product_over(client, 0.5)
    events: list[str] = []
    noted(monkeypatch, events)
    width = Q if backward else P
    for _ in range(40):
        x = torch.randn(rows, width)
        if backward:
            product.finish_backward(product.start_backward(x))
        else:
            product.finish_forward(product.start_forward(x))
    spared, checked = ["submit", "result", "own", "_is_drawn"], ["submit", "result", "own", "_is_drawn", "probe"]
    found = " ".join(events).split("submit")[1:]
    kinds = {tuple(part.split()) for part in found}
    assert kinds == {tuple(spared[1:]), tuple(checked[1:])}


def test_where_all_are_checked_the_image_is_made_while_the_worker_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    product = product_over(WorkerClient(MemoryWorker()), 1.0)
    events: list[str] = []
    noted(monkeypatch, events)
    product.finish_forward(product.start_forward(torch.randn(3, P)))
    assert events == ["submit", "probe", "result", "own"]


@pytest.mark.parametrize("rows", [1, 200], ids=["few", "many"])
def test_a_worker_that_changes_the_product_after_the_lot_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Over shared memory, which it can write to as long as it likes."""
    landed: list[Tensor] = []
    honest_result, honest_lot = ProductRequest.result, Verifier._is_drawn

    def result(self: ProductRequest) -> Tensor:
        landed.append(honest_result(self))
        return landed[-1]

    def lot(self: Verifier) -> bool:
        landed[-1].fill_(3.0)
        return honest_lot(self)

    monkeypatch.setattr(ProductRequest, "result", result)
    monkeypatch.setattr(Verifier, "_is_drawn", lot)
    R_in, R_out, W_star = protected(F32)
    with serving(tmp_path) as worker, WorkerClient.open(str(worker.address)) as client:
        product = product_over(client, 0.5)
        for _ in range(20):
            x = torch.randn(rows, P)
            found = product.finish_forward(product.start_forward(x))
            expected = R_out.inverse(R_in.apply(x) @ W_star)
            assert torch.allclose(found, expected, atol=1e-4)
        assert 0 < client.stats.verified < client.stats.crossings == 20


def test_a_reply_of_another_form_is_no_second_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for again, the same bytes; but nothing was drawn for it, and what is wrong in the end is refused."""
    worker = MemoryWorker(mischief=lambda data: b"?" + data[1:], times=2)
    client = WorkerClient(worker, retry=RetryPolicy(attempts=4, backoff_s=0.0))
    product = product_over(client, 1.0)
    events: list[str] = []
    noted(monkeypatch, events)
    product.finish_forward(product.start_forward(torch.randn(3, P)))
    assert client.stats.retries == 2
    assert events == ["submit", "probe", "result", "own"]


TEXT = r"a check by secret vectors is off by .* The worker is asked nothing any more: find out why, then load"


def test_after_a_wrong_product_the_worker_is_asked_nothing_more() -> None:
    """Not for other rows, nor by another matrix, nor to hold or forget one, nor for what was under way."""
    offloaded = Offloaded("private:verify=1", F32)
    client, worker = offloaded.client, offloaded.worker
    client.store(OTHER, lambda: torch.eye(4), shape=(4, 4), dtype=F32)
    offloaded.ask(3)
    answered, under_way = (offloaded.product.start_forward(torch.randn(3, P)) for _ in range(2))
    assert answered.sent is not None
    answered.sent.request.result()
    offloaded.tamper(lambda out: out.zero_())
    with pytest.raises(WrongProduct, match=TEXT) as first:
        offloaded.ask(3)
    seen, sent = len(worker.seen), client.stats.bytes_sent
    for ask in (
        lambda: offloaded.ask(3),
        lambda: offloaded.ask(300),
        lambda: offloaded.ask(3, backward=True),
        lambda: offloaded.product.finish_forward(answered),
        lambda: offloaded.product.finish_forward(under_way),
        lambda: client.multiply(OTHER, torch.ones(2, 4), transpose=False),
        lambda: client.store(b"3" * 16, lambda: torch.eye(4), shape=(4, 4), dtype=F32),
        lambda: client.forget(OTHER),
    ):
        with pytest.raises(WrongProduct, match=TEXT) as later:
            ask()
        assert str(later.value) == str(first.value)
    client.close()
    assert (len(worker.seen), client.stats.bytes_sent) == (seen, sent)


def test_after_numbers_that_are_not_finite_too() -> None:
    """Whether a product overflows when it is unmixed depends on secrets: that is an answer as well."""
    offloaded = Offloaded("private:verify=0.001", F32, lambda out: out.fill_(float("inf")))
    for _ in range(2):
        with pytest.raises(BadReply, match=r"NaN or infinity.*asked nothing any more"):
            offloaded.ask(3)
    assert offloaded.client.stats.crossings == 1


def test_whoever_waits_in_another_thread_hears_of_it_at_once(tmp_path: Path) -> None:
    """The worker computes, and would for long."""
    asked, go_on = threading.Event(), threading.Event()
    errors: list[Exception] = []
    with serving(tmp_path) as worker:
        client = WorkerClient.open(str(worker.address), deadline_s=10 * SECONDS)
        client.store(ID, lambda: torch.eye(4), shape=(4, 4), dtype=F32)
        computer = worker.service.answerer.computer

        def multiply(*_: Any, **__: Any) -> None:
            asked.set()
            go_on.wait(SECONDS)

        computer.multiply = multiply  # type: ignore[method-assign]

        def wait() -> None:
            try:
                client.multiply(ID, torch.ones(2, 4), transpose=False)
            except WireError as error:
                errors.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert asked.wait(SECONDS)
        with pytest.raises(WrongProduct, match="it lies"), client.refusing():
            raise WrongProduct("it lies")
        waiting.join(SECONDS)
        assert not waiting.is_alive()
        go_on.set()
    assert [type(error) for error in errors] == [WrongProduct]


def test_a_new_link_draws_other_vectors(tmp_path: Path) -> None:
    _, _, W_star = protected(F32)
    one, other = (Verifier(W_star, SecretStream.fresh(), 1.0) for _ in range(2))
    assert (one.probe(transpose=False).R - other.probe(transpose=False).R).abs().mean() > 0.5
