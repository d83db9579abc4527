"""Who computes next: however much one peer asks for, another one waits for one turn of it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from obfuscatune.protocol.messages import Header, MessageType
from obfuscatune.protocol.tensors import DType, bytes_of
from obfuscatune.worker import handlers as module
from obfuscatune.worker import sessions as turns_module
from obfuscatune.worker.sessions import Turns
from tests.worker.serving import RawClient, serving
from tests.worker.test_server import ID, W, X, multiply


def test_a_peer_with_many_requests_has_every_other_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of one peer wait when the other one comes; each turn takes as long."""
    now = 0.0
    monkeypatch.setattr(turns_module.time, "monotonic", lambda: now)
    turns, order = Turns(), []
    lock = threading.Lock()

    def compute(peer: str) -> None:
        nonlocal now
        with turns.of(peer), lock:
            order.append(peer)
            now += 1

    first = turns.of("first")
    first.__enter__()
    threads = [threading.Thread(target=compute, args=(peer,)) for peer in ["many"] * 8 + ["few"] * 2]
    for count, thread in enumerate(threads):
        thread.start()
        while len(turns._waiting) <= count:
            pass
    now += 1
    first.__exit__(None, None, None)
    for thread in threads:
        thread.join()
    assert order[:4].count("few") == 2
    assert not turns._spent  # nobody computes: nothing is kept


def test_who_stays_away_saves_nothing_up() -> None:
    turns = Turns()
    turns._spent.update(away=0.0, here=9.0)
    turns._computing = "here"
    thread = threading.Thread(target=lambda: turns.begin("away"))
    thread.start()
    while not turns._waiting:
        pass
    assert turns._spent["away"] == 9.0
    turns.end("here")
    thread.join()


def test_a_failure_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="no"), turns.of("a"):
        raise ValueError("no")
    with turns.of("b"):
        pass


def test_a_large_request_is_computed_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PRODUCTS", 5 * W.numel())
    rows = torch.arange(39, dtype=torch.float32).reshape(13, 3)
    with serving(tmp_path) as worker, RawClient(worker.address) as client:
        parts = []
        whole = worker.service.answerer.computer.multiply

        def counting(rows: torch.Tensor, *arguments: object, **options: object) -> None:
            parts.append(rows.shape[0])
            whole(rows, *arguments, **options)

        monkeypatch.setattr(worker.service.answerer.computer, "multiply", counting)
        client.hello()
        client.ask(Header(MessageType.STORE, 1, ID, DType.FLOAT32, 3, 4, 48), bytes_of(W))
        assert torch.equal(client.ask(multiply(rows), bytes_of(rows))[1], rows @ W)
        assert parts == [5, 5, 3]
        assert torch.equal(client.ask(multiply(), bytes_of(X))[1], X @ W)
