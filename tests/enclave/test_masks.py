"""One-time masks: what they show, that each is used once, and who is told to be wrong."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from obfuscatune import Masking, protect
from obfuscatune.enclave import masks as masking
from obfuscatune.enclave.accountant import advantage
from obfuscatune.enclave.keys import RootKey, SecretStream
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.enclave.masks import DEVIATION, GRID, ROWS_TOGETHER, Mask, Masked, MaskKey, MaskRequest, _Store, draw
from obfuscatune.enclave.mixing import bucket
from obfuscatune.errors import BadReply, BudgetExceeded, ConfigError, ProtectionError, WrongProduct
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import batch
from tests.protocol.peers import identity, make_identities
from tests.worker.serving import Serving, serving

GPT2 = ARCHITECTURES["gpt2"]
KEY = RootKey(bytes(range(32)))
SAMPLES = 1_000_000


class Answered:
    """A request whose product is here."""

    def __init__(self, product: Tensor) -> None:
        self.shape, self._product, self.rows = tuple(product.shape), product, torch.ones(1)

    def result(self) -> Tensor:
        return self._product

    def own(self, product: Tensor) -> Tensor:
        return product.clone()


class Trusting:
    """A client that judges nothing."""

    @contextmanager
    def refusing(self) -> Iterator[None]:
        yield


def mask_of(r: Tensor, W: Tensor) -> Mask:
    return Mask(r, MaskRequest(Answered(r @ W), lambda _: True, lambda _: None, Trusting()))  # type: ignore[arg-type]


def hidden(x: Tensor, deviation: float = DEVIATION) -> Tensor:
    """X' for x (n, p)."""
    mask = mask_of(draw(SecretStream.fresh(), *x.shape, deviation), torch.ones(x.shape[1], 1).double())
    return mask.hide(x, torch.empty(x.shape, dtype=torch.float64))


def test_the_sum_is_exact_and_on_the_grid() -> None:
    x = torch.randn(50, 64)
    r = draw(KEY.stream("masks"), 50, 64)
    out = mask_of(r.clone(), torch.ones(64, 1).double()).hide(x, torch.empty(50, 64, dtype=torch.float64))
    units = out.numpy() / GRID
    assert np.array_equal(units, np.rint(units))
    assert torch.equal(out - r, (x.double() / GRID).round() * GRID)


def test_what_was_hidden_comes_back() -> None:
    x, W = torch.randn(20, 32).double(), torch.randn(32, 16).double()
    mask = mask_of(draw(SecretStream.fresh(), 20, 32), W)
    Y = mask.reveal(mask.hide(x, torch.empty_like(x)) @ W, torch.float64)
    assert (Y - x @ W).abs().max() / (x @ W).abs().max() < 1e-6


def test_a_mask_hides_once_and_is_gone() -> None:
    x, W = torch.randn(3, 8), torch.randn(8, 4).double()
    r = draw(SecretStream.fresh(), 3, 8)
    mask = mask_of(r, W)
    with pytest.raises(ProtectionError, match="hides no product"):
        mask.reveal(torch.zeros(3, 4).double(), torch.float64)
    mask = mask_of(r, W)
    out = torch.empty(3, 8, dtype=torch.float64)
    mask.hide(x, out)
    assert not r.any()
    with pytest.raises(ProtectionError, match="has hidden rows before"):
        mask.hide(x, out)
    mask.reveal(out @ W, torch.float64)
    with pytest.raises(ProtectionError, match="revealed it before"):
        mask.reveal(out @ W, torch.float64)


def test_the_best_test_has_the_advantage_of_the_theorem() -> None:
    """Two inputs of one row, at an L small enough to see something; by Neyman and Pearson the best test projects on
    their difference."""
    x = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    difference = 2 * x[0].double()
    for deviation, noticeable in ((2.0**4, True), (DEVIATION, False)):
        mu = float(difference.norm()) / deviation
        right = sum(
            float((hidden((sign * x).expand(SAMPLES // 2, 4), deviation) @ (sign * difference) > 0).double().mean())
            for sign in (1, -1)
        )
        assert right - 1 == pytest.approx(advantage(mu), abs=4 / math.sqrt(SAMPLES))
        assert (right - 1 > 0.05) == noticeable


def test_the_lowest_bits_are_uniform() -> None:
    """Chi-square over the values of 1 to 8 bits, which a fixed x would show through otherwise."""
    units = (hidden(torch.full((SAMPLES, 4), 0.3)).numpy() / GRID).astype(np.int64).ravel()
    for bits in (1, 2, 4, 8):
        counts = np.bincount(units & (2**bits - 1), minlength=2**bits)
        expected = units.size / 2**bits
        freedom = 2**bits - 1
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom) + 20  # 1e-7


def rows_sent(worker: Serving) -> list[Tensor]:
    """From here on, each request's rows."""
    computer, sent = worker.service.answerer.computer, []
    honest = computer.multiply

    def multiply(rows: Tensor, *rest: Any, **how: Any) -> None:
        sent.append(rows.clone())
        honest(rows, *rest, **how)

    computer.multiply = multiply  # type: ignore[method-assign]
    return sent


@contextmanager
def two_workers(tmp_path: Path) -> Iterator[tuple[Serving, Serving]]:
    for name in ("compute", "mask"):
        (tmp_path / name).mkdir()
    with serving(tmp_path / "compute") as compute, serving(tmp_path / "mask") as mask:
        yield compute, mask


def guarded(compute: Serving, mask: Serving, **how: Any) -> Any:
    model = GPT2.build(torch.float32)
    return protect(model, str(compute.address), "guarded", mask_worker=str(mask.address), base="closed", **how)


def test_the_mask_worker_sees_noise_that_does_not_depend_on_the_text(tmp_path: Path) -> None:
    """And each request has masks of its own, though the text is the same each time."""
    with two_workers(tmp_path) as (compute, mask), torch.no_grad():
        at_compute, at_mask = rows_sent(compute), rows_sent(mask)
        with guarded(compute, mask) as model:
            for _ in range(3):
                model(**batch((9, 4), 97).inputs())
            assert model.protection.masks.stats.ahead > 0
            assert model.protection.stats.verified == model.protection.stats.crossings > 0
    rows = [row for sent in (at_compute, at_mask) for request in sent for row in request]
    assert len({row.numpy().tobytes() for row in rows}) == len(rows)
    for row in rows:
        assert float(row.double().square().mean().sqrt()) == pytest.approx(DEVIATION, rel=0.7)
        assert torch.equal((row / GRID).round(), row / GRID)


@pytest.mark.parametrize("party", ["compute", "mask"])
@pytest.mark.parametrize(
    ("added", "error", "said"),
    [
        (1e-3, WrongProduct, "product is wrong"),
        *((it, BadReply, "product contains NaN") for it in (math.nan, math.inf)),
    ],
)
def test_a_wrong_product_names_the_party_and_the_refusal_stays(
    tmp_path: Path, party: str, added: float, error: type[Exception], said: str
) -> None:
    """What is added is some thousandth of a row of X* W*, and some 10^-12 of what passes under the mask; or NaN."""
    inputs = batch((9, 4), 97).inputs()
    with (
        two_workers(tmp_path) as (compute, mask),
        torch.no_grad(),
        guarded(compute, mask, masking=Masking(memory_bytes=0)) as model,
    ):
        model(**inputs)
        computer = {"compute": compute, "mask": mask}[party].service.answerer.computer
        honest = computer.multiply

        def multiply(rows: Tensor, matrix: Tensor, out: Tensor, **how: bool) -> None:
            honest(rows, matrix, out, **how)
            out[0, 0] += added * float(matrix.square().sum().sqrt())

        computer.multiply = multiply  # type: ignore[method-assign]
        with pytest.raises(error, match=f"the {party} worker's {said}"):
            model(**inputs)
        computer.multiply = honest  # type: ignore[method-assign]
        with pytest.raises(error, match=f"the {party} worker's {said}"):
            model(**inputs)


def test_masks_are_drawn_ahead_within_their_memory(worker: LocalWorker, mask_worker: LocalWorker) -> None:
    inputs = batch((9, 4), 97).inputs()
    for memory_bytes, expected in ((0, False), (1 << 30, True)):
        with (
            torch.no_grad(),
            protect(
                GPT2.build(torch.float32),
                worker.address,
                "guarded",
                mask_worker=mask_worker.address,
                masking=Masking(memory_bytes=memory_bytes),
                base="closed",
            ) as model,
        ):
            for _ in range(4):
                model(**inputs)
            masks = model.protection.masks
            assert (masks.stats.ahead > 0) == expected
            assert masks.stats.ahead + masks.stats.awaited == model.protection.stats.crossings
            assert masks._store.nbytes <= memory_bytes


def test_while_masks_are_stocked_none_is_drawn(worker: LocalWorker, mask_worker: LocalWorker) -> None:
    inputs = batch((9, 4), 97).inputs()
    with (
        torch.no_grad(),
        protect(
            GPT2.build(torch.float32), worker.address, "guarded", mask_worker=mask_worker.address, base="closed"
        ) as model,
    ):
        model(**inputs)
        masks, crossings = model.protection.masks, model.protection.stats.crossings
        with masks.stocked(3):
            assert len(masks._store) >= 3 * crossings
            asked, awaited = masks.client.stats.crossings, masks.stats.awaited
            for _ in range(3):
                model(**inputs)
            assert masks.stats.awaited == awaited
            assert masks.client.stats.crossings == asked, "the mask worker rests"


def test_masks_of_few_rows_are_drawn_together(tmp_path: Path) -> None:
    """Fewer requests to the mask worker than to the other, no row of a mask twice, and plain results."""
    inputs = batch((1, 1), 97).inputs()
    plain = GPT2.build(torch.float32).eval()
    with two_workers(tmp_path) as (compute, mask), torch.no_grad():
        at_compute, at_mask = rows_sent(compute), rows_sent(mask)
        with guarded(compute, mask) as model:
            for _ in range(30):
                torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)
            stats = model.protection.masks.stats
        assert stats.ahead > stats.awaited
        assert len(at_mask) < len(at_compute) / 2
        assert max(len(rows) for rows in at_mask) == ROWS_TOGETHER // len(at_compute[0]) * len(at_compute[0])
        seen = {row.numpy().tobytes() for rows in (*at_mask, *at_compute) for row in rows}
        assert len(seen) == sum(len(rows) for rows in (*at_mask, *at_compute))


@pytest.mark.parametrize(
    ("memory", "together"), [(10**9, 8), (4 * 15 * 8 * 9 * 60, 5), (4 * 5 * 8 * 9 * 60, 1), (0, 1)]
)
def test_kinds_share_a_memory_that_is_too_small_for_all(memory: int, together: int) -> None:
    """Of four kinds each has a quarter, for three times as many masks as are drawn together."""
    store, masked = _Store(), Masked(bytes(16), (20, 40), None)  # type: ignore[arg-type]
    keys = [MaskKey(bytes([index] * 16), 9, transpose=False) for index in range(4)]
    for key in keys:
        store.take(key, masked)
    wanted = [store.wanted(keys[0], masked, memory) for _ in range(3)]
    assert wanted == ([together, 0, 0] if together > 1 else [1, 1, 0])


def test_a_process_that_is_run_on_twice_drops_what_was_drawn_ahead(
    worker: LocalWorker, mask_worker: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked past Python's hooks, restored on another boot, or connected anew: no mask from before is used."""
    model = protect(
        GPT2.build(torch.float32), worker.address, "guarded", mask_worker=mask_worker.address, base="closed"
    )
    masks = model.protection.masks
    with torch.no_grad():
        model(**batch((9, 4), 97).inputs())
    key, masked = next(iter(masks._store.asked)), model.protection.offloaded[0].crossing.product.held.masked
    masks.draw_ahead(key, masked)
    assert len(masks._store)

    def left() -> int:
        masks._drop_what_is_not_ours()
        return len(masks._store)

    assert left() > 0
    pid = ctypes.CDLL(None).fork()
    if pid == 0:
        os._exit(left())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert left() > 0
    model.protection.stats.reconnects += 1
    assert left() == 0
    masks.draw_ahead(key, masked)
    assert left() == 1
    monkeypatch.setattr("obfuscatune.enclave.masks._boot_id", lambda: b"another boot")
    assert left() == 0
    model.close()


def test_the_boot_is_read_again_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file that stays open; also where somebody closed it, or opened another as its number; or there is none."""
    boots = [f"{number:036}\n".encode() for number in range(3)]
    path, other, opened = tmp_path / "boot_id", tmp_path / "other", []

    def count(*arguments: Any) -> int:
        opened.append(real_open(*arguments))
        return opened[-1]

    real_open = os.open
    monkeypatch.setattr(masking, "_BOOT_ID", path)
    monkeypatch.setattr(masking.os, "open", count)
    masking._boot_id_file.cache_clear()
    try:
        assert masking._boot_id() == b""
        masking._boot_id_file.cache_clear()
        for boot in boots:
            path.write_bytes(boot)
            assert masking._boot_id() == boot
        (file,) = opened
        os.close(file)
        assert masking._boot_id() == boots[-1]
        other.write_bytes(b"something else, which is no UUID\n")
        file = opened[-1]
        with other.open("rb") as another:
            os.dup2(another.fileno(), file)
        assert masking._boot_id() == boots[-1]
        assert len(opened) == 3
    finally:
        masking._boot_id_file.cache_clear()
        for file in {*opened}:
            with contextlib.suppress(OSError):
                os.close(file)


def test_the_budget_ends_the_run_before_anything_is_sent(tmp_path: Path) -> None:
    with two_workers(tmp_path) as (compute, mask), torch.no_grad():
        at_compute = rows_sent(compute)
        with guarded(compute, mask, masking=Masking(budget=1e-9)) as model, pytest.raises(BudgetExceeded):
            model(**batch((9, 4), 97).inputs())
        assert not at_compute


def test_the_same_worker_twice_is_refused(worker: LocalWorker, tmp_path: Path) -> None:
    address, other = worker.address, "unix:/run/other.sock"
    for workers, mask_worker, profile, said in (
        (address, address, "guarded", "the mask worker is the worker"),
        (address, None, "guarded", "takes two workers in different hands"),
        (None, other, "guarded", "takes two workers in different hands"),
        (address, other, "private", "has no masks"),
    ):
        with pytest.raises(ConfigError, match=said):
            protect(GPT2.build(torch.float32), workers, profile, mask_worker=mask_worker)


def test_the_same_key_twice_is_refused(tmp_path: Path) -> None:
    tls = identity(make_identities(tmp_path), "enclave", "worker")
    with pytest.raises(ConfigError, match="pinned by the same key"):
        protect(
            GPT2.build(torch.float32),
            "tcp:127.0.0.1:1",
            "guarded",
            tls=tls,
            mask_worker="tcp:127.0.0.1:2",
            masking=Masking(tls=tls),
        )


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, 1), (2, 2), (3, 3), (5, 6), (7, 8), (9, 12), (13, 16), (17, 24), (25, 32), (1537, 2048)]
)
def test_buckets_are_powers_of_two_and_their_halves(rows: int, expected: int) -> None:
    assert bucket(rows) == expected
    assert bucket(expected) == expected


@torch.no_grad()
def test_renewed_secrets_reach_both_workers(tmp_path: Path) -> None:
    inputs = batch((9, 4), 97).inputs()
    with two_workers(tmp_path) as (compute, mask), guarded(compute, mask) as model:
        expected = model(**inputs).logits
        model.protection.rekey()
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)
        held = len(model.protection.offloaded)
        for worker in (compute, mask):
            store = worker.service.answerer.store
            assert len(store._held) == held, "the old matrices are forgotten"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_draws_masks_of_its_own(tmp_path: Path) -> None:
    inputs = batch((9, 4), 97).inputs()
    with two_workers(tmp_path) as (compute, mask):
        at_compute = rows_sent(compute)
        with guarded(compute, mask) as model:
            for _ in range(2):
                expected = model(**inputs).logits
            pid = os.fork()
            if pid == 0:
                found = model(**inputs).logits
                os._exit(
                    0 if torch.allclose(found, expected, atol=1e-4) and not model.protection.masks.stats.dropped else 1
                )
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            model(**inputs)
    rows = [row.numpy().tobytes() for request in at_compute for row in request]
    assert len(set(rows)) == len(rows)
