"""Secrets of crossings of many rows are drawn ahead for the next crossing of the same kind, and used once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from obfuscatune.enclave.keys import SecretStream, _renew_fresh_streams
from obfuscatune.enclave.linear import OffloadedProduct
from obfuscatune.enclave.link import WorkerLink
from obfuscatune.enclave.local import LocalWorker
from obfuscatune.enclave.mixer import ELEMENTS_AHEAD, MANY_AHEAD, MANY_TOGETHER, KroneckerMixer
from obfuscatune.enclave.mixing import KroneckerMixing
from obfuscatune.enclave.transforms.identity import UnsafeIdentity

ID = bytes(range(1, 17))
SHIELD, ROWS, WIDTH = 8, 60, 70


def some(rows: int = ROWS, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + width), dtype=dtype)


def crossed(mixer: KroneckerMixer, x: Tensor) -> KroneckerMixing:
    """One crossing of x, after which the next one's secrets are drawn; exact in any case."""
    mixing = mixer.draw(*x.shape)
    assert isinstance(mixing, KroneckerMixing)
    mixing.mix(x, 1.0, mixed := x.new_empty(mixing.rows, x.shape[1]))
    torch.testing.assert_close(mixing.unmix(mixed), x, rtol=0, atol=1e3 * torch.finfo(x.dtype).eps)
    v = some(x.shape[1], 2, x.dtype)
    atol = 1e3 * torch.finfo(x.dtype).eps * x.shape[1] ** 0.5
    torch.testing.assert_close(mixing.image(x, v), (mixed @ v).double(), rtol=0, atol=atol)
    mixer.draw_ahead(mixing)
    return mixing


def numbers(mixing: KroneckerMixing) -> set[float]:
    """A few of each secret: of both factors and of the shield."""
    return {mixing._Q_a[0, 0].item(), mixing._Q_b[0, 0].item(), *mixing.shield[:, 0].tolist()}


def mixer(**named: object) -> KroneckerMixer:
    return KroneckerMixer(SHIELD, SecretStream.fresh(), **named)  # type: ignore[arg-type]


def test_what_was_drawn_ahead_is_what_the_next_crossing_takes_and_no_other() -> None:
    m, taken = mixer(), [crossed(KroneckerMixer(SHIELD, SecretStream.fresh()), some())]
    for _ in range(20):
        ahead = list(m._many.ready.get((ROWS, WIDTH), []))
        taken.append(crossed(m, some()))
        assert not ahead or taken[-1] in ahead
    assert len(m._many.ready[ROWS, WIDTH]) in range(1, MANY_TOGETHER + 1)
    assert len(set.union(*map(numbers, taken))) == sum(len(numbers(mixing)) for mixing in taken)
    assert len({tuple(mixing._order.tolist()) for mixing in taken}) == len(taken)


def test_mixed_again_it_takes_another_shield() -> None:
    """Two products of one shield would differ by nothing but x."""
    m = mixer()
    crossed(m, some())
    mixing = crossed(m, some())
    first = mixing.shield.clone()
    mixing.mix(some(), 1.0, some(mixing.rows))
    assert not torch.isclose(first, mixing.shield).any()


def test_other_kinds_are_drawn_on_the_spot() -> None:
    m = mixer()
    crossed(m, some())
    for x in (some(ROWS + 1), some(width=WIDTH + 1), some(dtype=torch.float32)):
        mixing = crossed(m, x)
        assert (mixing.shield.shape[1], mixing.shield.dtype) == (x.shape[1], x.dtype)


def test_the_shield_is_as_loud_as_what_it_hides() -> None:
    """Drawn ahead, too, when the rows' size is not known yet."""
    m = mixer(shield_scale=2.0)
    for size in (1.0, 1.0, 100.0, 0.01):
        mixing = m.draw(ROWS, 4000)
        assert isinstance(mixing, KroneckerMixing)
        mixing.mix(size * some(width=4000), size, some(mixing.rows, 4000))
        assert mixing.shield.square().mean().sqrt().item() == pytest.approx(2 * size, rel=0.05)
        m.draw_ahead(mixing)


def test_so_many_kinds_are_kept_and_no_more() -> None:
    """Those of the crossings last: each batch of another length would leave some behind."""
    m = mixer()
    for rows in range(ROWS, ROWS + 3 * MANY_AHEAD):
        crossed(m, some(rows))
    assert list(m._many.ready) == [(rows, WIDTH) for rows in range(ROWS + 2 * MANY_AHEAD, ROWS + 3 * MANY_AHEAD)]


def test_of_larger_shields_fewer_are_drawn_together() -> None:
    m = mixer()
    shield_rows = m.draw(ROWS, WIDTH).rows - ROWS
    for width, count in (
        (100, MANY_TOGETHER),
        (ELEMENTS_AHEAD // shield_rows // 2, 2),
        (ELEMENTS_AHEAD // shield_rows, 1),
    ):
        crossed(m, some(width=width))
        assert len(list(m._many.ready.values())[-1]) == count


def test_a_large_shield_is_not_kept() -> None:
    """At full rank it is as large as what it hides."""
    m = mixer(full_rank=True)
    width = 1 + int(ELEMENTS_AHEAD**0.5) + ROWS
    crossed(m, some(width=width))
    assert not m._many.ready
    crossed(m, some(width=100))
    assert list(m._many.ready) == [(ROWS, 100)]


def test_a_forked_child_takes_nothing_that_its_parent_drew_ahead() -> None:
    m = mixer()
    crossed(m, some())
    ahead = set(*m._many.ready.values())
    _renew_fresh_streams()  # what runs in a forked child
    again = crossed(m, some())
    assert again not in ahead
    for mixing in ahead:
        assert numbers(again).isdisjoint({mixing._Q_a[0, 0].item(), mixing._Q_b[0, 0].item()})
    for _ in range(MANY_TOGETHER):
        assert crossed(m, some()) not in {again, *ahead}


def test_threads_take_other_secrets() -> None:
    m = mixer()
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: crossed(m, some()), range(200)))
    assert len({id(mixing) for mixing in taken}) == 200
    assert len({mixing.shield[0, 0].item() for mixing in taken}) == 200


def test_a_product_draws_ahead_once_it_has_sent(worker: LocalWorker) -> None:
    m, W = mixer(), some(WIDTH, 90)
    with WorkerLink.open(worker.address) as link:
        link.store(ID, lambda: W, shape=(WIDTH, 90), dtype=W.dtype)
        product = OffloadedProduct(link, ID, UnsafeIdentity(WIDTH), UnsafeIdentity(90), m)
        for _ in range(3):
            crossing = product.start_forward(some())
            ahead = list(m._many.ready[ROWS, WIDTH])
            torch.testing.assert_close(product.finish_forward(crossing), some() @ W, rtol=0, atol=1e-11)
            crossing = product.start_forward(some())
            assert crossing.mixing in ahead
            product.finish_forward(crossing)
