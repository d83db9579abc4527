"""A device as a worker: exact from any thread, judged as a process is, bounded, recorded, and alone in forked children.

On `device:cpu`; where there is a GPU, on that too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from obfuscatune import DeviceClient, protect
from obfuscatune.backend import Computer, Underway
from obfuscatune.enclave.client import WorkerLink, device, open_link
from obfuscatune.errors import (
    BadReply,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    ProtectionError,
    QuotaExceeded,
    WireError,
    WrongProduct,
)
from obfuscatune.protocol.addresses import DeviceAddress
from obfuscatune.protocol.tls import TlsConfig
from obfuscatune.protocol.transcript import read_transcript
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import backward, batch, copy_of, deviation, largest_deviation, with_lora

NO_GPU = "no CUDA device on this machine that this torch can use"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
DEVICES = ["device:cpu", pytest.param("device:cuda:0", marks=on_gpu)]
ID, OTHER = bytes(range(1, 17)), bytes(range(2, 18))
W = torch.arange(60 * 50, dtype=torch.float64).remainder(17).view(60, 50)
X = torch.arange(7 * 60, dtype=torch.float64).remainder(13).view(7, 60)
"""Whole numbers: exact in any order of summation."""


@pytest.fixture(params=DEVICES)
def link(request: pytest.FixtureRequest) -> Iterator[WorkerLink]:
    with open_link(request.param) as opened:
        opened.store(ID, lambda: W, shape=(60, 50), dtype=W.dtype)
        yield opened


def of(computer: Computer, **how: float) -> DeviceClient:
    link = DeviceClient(computer, DeviceAddress("cpu"), **how)  # type: ignore[arg-type]
    link.store(ID, lambda: W, shape=(60, 50), dtype=W.dtype)
    return link


class Tampering(Computer):
    """A device that changes its products."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__(torch.device("cpu"))
        self.change = change

    def _compute(self, rows: Tensor, matrix: Tensor, out: Tensor, transpose: bool) -> None:
        super()._compute(rows, matrix, out, transpose)
        self.change(out)


class Hanging:
    """A product that never comes."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def is_at_rest(self) -> bool:
        return True

    def wait(self, seconds: float, broken_off: Callable[[], bool] = bool) -> None:
        self.asked.set()
        for _ in range(10**9):
            if broken_off() or seconds < 1:
                raise DeadlineExceeded("the device has not answered")


class HangingComputer(Computer):
    underway = Hanging()

    def start(self, rows: Tensor, matrix: Tensor, out: Tensor, *, transpose: bool) -> Underway:
        return self.underway


def test_products_of_many_threads_while_matrices_come_and_go(link: WorkerLink) -> None:
    def ask(number: int) -> bool:
        own = number.to_bytes(16, "big")
        link.store(own, lambda: W * number, shape=(60, 50), dtype=W.dtype)
        ahead = [link.submit(own, link.allocate(*X.shape, X.dtype).copy_(X * it), transpose=False) for it in (1, 2, 3)]
        link.forget(own)
        back = link.multiply(ID, X @ W, transpose=True)
        exact = [torch.equal(it.own(it.result()), X @ W * (number * at)) for at, it in enumerate(ahead, start=1)]
        return all(exact) and torch.equal(back, X @ W @ W.T)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(1, 33)))
    assert link.stats.crossings == 32 * 4
    assert link.stats.bytes_received == 32 * 8 * 7 * (3 * 50 + 60)


def test_the_matrix_may_be_overwritten_once_it_is_stored(link: WorkerLink) -> None:
    memory = W.clone()
    link.store(OTHER, lambda: W, shape=(60, 50), dtype=W.dtype, tensor=memory)
    memory.zero_()
    assert torch.equal(link.multiply(OTHER, X, transpose=False), X @ W)


def test_what_the_device_can_write_to_is_copied(link: WorkerLink) -> None:
    """Rows that were allocated and their product lie in registered memory; others, and theirs, do not."""
    shared = link.submit(ID, link.allocate(7, 60, X.dtype).copy_(X), transpose=False)
    product = shared.result()
    own = shared.own(product)
    product.zero_()
    assert torch.equal(own, X @ W)
    apart = link.submit(ID, X, transpose=False)
    assert apart.own(apart.result()) is apart.result()
    assert link._allocator.offset_of(apart.result()) is None  # type: ignore[attr-defined]
    assert torch.equal(apart.result(), X @ W)


def test_rows_that_lie_elsewhere_pass_through_registered_memory_too() -> None:
    """As those of a fleet: a thread would wait for a copy from other memory."""
    placed: list[bool] = []

    class Watching(Computer):
        def start(self, rows: Tensor, matrix: Tensor, out: Tensor, *, transpose: bool) -> Underway:
            placed.extend(link._allocator.offset_of(it) is not None for it in (rows, out))
            return super().start(rows, matrix, out, transpose=transpose)

    link = of(Watching(torch.device("cpu")))
    asked = link.submit(ID, X, transpose=False)
    assert placed == [True, True]
    changed = link._underway[asked][1]  # type: ignore[index]
    assert torch.equal(asked.result(), X @ W)
    changed.zero_()
    assert torch.equal(asked.result(), X @ W)
    assert not link._running


def test_a_stored_matrix_a_closed_link_and_shapes(link: WorkerLink) -> None:
    with pytest.raises(ConfigError, match="store it first"):
        link.multiply(OTHER, X, transpose=False)
    with pytest.raises(ConfigError, match="expected rows of"):
        link.multiply(ID, X, transpose=True)
    with pytest.raises(ProtectionError, match="NaN"):
        link.multiply(ID, X.log(), transpose=False)
    waiting = link.submit(ID, X, transpose=False)
    link.close()
    link.close()
    assert torch.equal(waiting.result(), X @ W)
    for ask in (
        lambda: link.multiply(ID, X, transpose=False),
        lambda: link.store(ID, lambda: W, shape=(60, 50), dtype=W.dtype),
    ):
        with pytest.raises(ProtectionError, match="closed"):
            ask()


@pytest.mark.parametrize("profile", ["private", "guarded"])
@pytest.mark.parametrize(
    ("change", "error"),
    [(lambda out: out[0].mul_(1.01), WrongProduct), (lambda out: out[0, 0].fill_(torch.nan), BadReply)],
)
def test_a_wrong_product_ends_it_for_good(
    change: Callable[[Tensor], object], error: type[WireError], profile: str
) -> None:
    link = DeviceClient(Tampering(change), DeviceAddress("cpu"))
    more = {"mask_worker": "device:cpu:1"} if profile == "guarded" else {"verify": 1.0}
    with protect(ARCHITECTURES["gpt2"].build(torch.float32), link, profile, first_blocks=0, **more) as model:
        inputs = batch((9,), 97).inputs()
        with pytest.raises(error):
            model(**inputs)
        link._computer.change = lambda out: None  # type: ignore[attr-defined]
        for ask in (lambda: model(**inputs), lambda: link.store(ID, lambda: W, shape=(60, 50), dtype=W.dtype)):
            with pytest.raises(error, match="asked nothing any more"):
                ask()


def test_a_device_that_keeps_matrices_too_coarsely_is_found() -> None:
    link = DeviceClient.open("device:cpu", dtype=torch.bfloat16)
    model = protect(ARCHITECTURES["gpt2"].build(torch.float32), link, first_blocks=0, verify=1.0)
    with model, pytest.raises(WrongProduct, match="lower precision"):
        model(**batch((9,), 97).inputs())
    with DeviceClient.open("device:cpu", dtype=torch.float32, memory_bytes=4 * 3000) as narrow:
        narrow.store(ID, lambda: W, shape=(60, 50), dtype=W.dtype)  # 24 kB in float64
        assert torch.equal(narrow.multiply(ID, X, transpose=False), X @ W)


def test_a_device_without_room() -> None:
    with DeviceClient.open("device:cpu", memory_bytes=W.nbytes) as link:
        link.store(ID, lambda: W, shape=(60, 50), dtype=W.dtype)
        with pytest.raises(QuotaExceeded, match=r"no room for a matrix of 60 x 50.*--first-blocks"):
            link.store(OTHER, lambda: W, shape=(60, 50), dtype=W.dtype)
        link.store(ID, lambda: W, shape=(60, 50), dtype=W.dtype)  # once more, in its own place
        link.forget(ID)
        with pytest.raises(ConfigError, match="its source made"):
            link.store(ID, lambda: W[:3], shape=(60, 50), dtype=W.dtype)
        link.store(OTHER, lambda: W, shape=(60, 50), dtype=W.dtype)


def test_room_for_matrices_that_come_at_once() -> None:
    """Of sixteen that are on their way together, as many are taken as fit."""
    meeting = threading.Barrier(16)

    class Slow(Computer):
        def adopt(self, matrix: Tensor) -> Tensor:
            meeting.wait(30)
            return super().adopt(matrix)

    link = DeviceClient(Slow(torch.device("cpu")), DeviceAddress("cpu"), memory_bytes=3 * W.nbytes)

    def store(number: int) -> bool:
        try:
            link.store(number.to_bytes(16, "big"), lambda: W, shape=(60, 50), dtype=W.dtype)
        except QuotaExceeded:
            meeting.wait(30)
            return False
        return True

    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(store, range(1, 17))) == 3


def test_a_device_that_hangs_is_given_up_for_good() -> None:
    link = of(HangingComputer(torch.device("cpu")), deadline_s=0.5)
    with pytest.raises(DeadlineExceeded):
        link.multiply(ID, X, transpose=False)
    with pytest.raises(DeadlineExceeded, match="asked nothing any more"):
        link.submit(ID, X, transpose=False)


def test_what_a_hanging_device_may_still_write_to_is_never_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    class NeverAtRest(Hanging):
        def is_at_rest(self) -> bool:
            return False

    class Stuck(Computer):
        def start(self, rows: Tensor, matrix: Tensor, out: Tensor, *, transpose: bool) -> Underway:
            return NeverAtRest()

    monkeypatch.setattr(device, "CLOSING_SECONDS", 0.0)
    monkeypatch.setattr(device, "_abandoned", [])
    link = of(Stuck(torch.device("cpu")))
    host = link._host
    asked = link.submit(ID, link.allocate(7, 60, X.dtype).copy_(X), transpose=False)
    link.close()
    del asked, link
    ((running, kept),) = device._abandoned
    assert kept is host and isinstance(running[0], NeverAtRest)


def test_waiting_is_broken_off() -> None:
    computer = HangingComputer(torch.device("cpu"))
    link, raised = of(computer), []

    def wait() -> None:
        try:
            link.multiply(ID, X, transpose=False)
        except ConnectionLost as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    computer.underway.asked.wait()
    with link.broken_off():
        thread.join(30)
    assert raised


def test_a_device_that_fails_is_asked_nothing_more() -> None:
    def fail(out: Tensor) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand a stack")

    link = of(Tampering(fail))
    with pytest.raises(ConnectionLost, match=r"failed: CUDA error: an illegal memory access was encountered$"):
        link.multiply(ID, X, transpose=False)
    with pytest.raises(ConnectionLost, match="asked nothing any more"):
        link.multiply(ID, X, transpose=False)


def test_the_transcript_is_what_crossed(tmp_path: Path) -> None:
    with DeviceClient.open("device:cpu", record=tmp_path / "t") as link:
        link.store(ID, lambda: W, shape=(60, 50), dtype=W.dtype)
        first, second = (link.submit(ID, X * it, transpose=False) for it in (1, 2))
        link.submit(ID, X * 3, transpose=False)  # nobody waits for it
        second.result(), first.result()
        link.forget(ID)
    entries = list(read_transcript(tmp_path / "t"))
    assert [it.header.type.name for it in entries] == [
        *("STORE", "STORED", "MULTIPLY", "MULTIPLY", "MULTIPLY", "PRODUCT", "PRODUCT", "FORGET", "DONE"),
    ]
    tensors = [it.tensor for it in entries if it.tensor is not None]
    expected = [W, X, X * 2, X * 3, X * 2 @ W, X @ W]
    assert all(torch.equal(found, it) for found, it in zip(tensors, expected, strict=True))
    assert entries[6].header.request_id == entries[2].header.request_id
    assert len({it.session for it in entries}) == 1


def child_of(work: Callable[[], object]) -> int:
    """The status of a forked child that runs `work`."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException as error:
            os.write(2, f"in the child: {type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
class TestForks:
    def test_a_child_goes_on_with_what_was_stored(self) -> None:
        with open_link("device:cpu") as link:
            link.store(ID, lambda: W, shape=(60, 50), dtype=W.dtype)
            rows = link.allocate(7, 60, X.dtype).copy_(X)
            before = link.submit(ID, rows, transpose=False)

            def child() -> None:
                with pytest.raises(ConnectionLost, match="ask again"):
                    before.result()
                own = link.allocate(7, 60, X.dtype).copy_(X * 2)
                assert torch.equal(link.multiply(ID, own, transpose=False), X @ W * 2)
                rows.zero_()  # not the parent's

            assert child_of(child) == 0
            assert torch.equal(before.result(), X @ W)

    def test_a_link_that_records_is_the_parents(self, tmp_path: Path) -> None:
        with DeviceClient.open("device:cpu", record=tmp_path / "t") as link:
            link.store(ID, lambda: W, shape=(60, 50), dtype=W.dtype)

            def child() -> None:
                with pytest.raises(ConfigError, match="forked child"):
                    link.multiply(ID, X, transpose=False)
                link.close()

            assert child_of(child) == 0
            link.multiply(ID, X, transpose=False)
        assert len(list(read_transcript(tmp_path / "t"))) == 4


class TestNames:
    @given(st.sampled_from(["cpu", "cuda"]), st.integers(0, 999))
    def test_an_address_is_read_as_it_is_written(self, kind: str, index: int) -> None:
        address = DeviceAddress(kind, index)
        assert DeviceAddress.parse(str(address)) == address

    @settings(max_examples=200)
    @given(st.text(max_size=20) | st.from_regex(r"device:(cpu|cuda|gpu|CPU)?:?-?[0-9]{0,4}.?\n?", fullmatch=True))
    @example("device:cpu\n")
    @example("device:cuda:0/../1")
    @example("device:cuda:\u0661")
    def test_nothing_else_is_an_address(self, text: str) -> None:
        try:
            address = DeviceAddress.parse(text)
        except ConfigError:
            return
        short, number = f"device:{address.kind}", text.rpartition(":")[2]
        assert (text == short and address.index == 0) or (
            text == f"{short}:{number}" and number.isascii() and number.isdigit() and int(number) == address.index
        )

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_a_device_that_is_not_there(self) -> None:
        with pytest.raises(ConfigError, match="device:cuda:3: this machine has no CUDA device"):
            open_link("device:cuda:3")

    def test_what_does_not_go_with_a_device(self) -> None:
        model = ARCHITECTURES["gpt2"].build(torch.float32)
        with pytest.raises(ConfigError, match="only multiplies"):
            protect(model, "device:cpu", "paper")
        for same in ("device:cpu", "device:cpu:0", DeviceClient.open("device:cpu")):
            with pytest.raises(ConfigError, match="the mask worker is the worker"):
                protect(model, "device:cpu", "guarded", mask_worker=same)
        with pytest.raises(ConfigError, match="takes no TLS"):
            open_link("device:cpu", tls=TlsConfig(Path("a"), Path("b"), Path("c")))


@on_gpu
@pytest.mark.parametrize("profile", ["private", "guarded"])
@pytest.mark.parametrize("enclave", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_as_near_to_float64_as_plain(profile: str, enclave: str, dtype: torch.dtype) -> None:
    """The enclave's part on either side; plain on the same device."""
    more = {"mask_worker": "device:cpu"} if profile == "guarded" else {}
    architecture, inputs = ARCHITECTURES["gpt2"], batch((33, 20), 97)
    exact_loss, exact = backward(with_lora(architecture.build(torch.float64), architecture), inputs)
    plain = with_lora(architecture.build(dtype), architecture).to(enclave)
    there = type(inputs)(*(it.to(enclave) for it in (inputs.input_ids, inputs.attention_mask, inputs.labels)))
    plain_loss, expected = backward(copy_of(plain), there)
    with protect(plain, "device:cuda:0", profile, first_blocks=0, **more) as model:
        loss, found = backward(model, there)
    assert deviation(exact_loss.float().cpu(), loss.float().cpu()) < 1e-5 + 4 * deviation(
        exact_loss.float().cpu(), plain_loss.float().cpu()
    )
    assert largest_deviation(expected, found) < (1e-3 if dtype == torch.float32 else 0.3)
    assert exact.keys() == found.keys()
