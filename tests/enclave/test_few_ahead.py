"""Secrets of crossings of few rows are drawn ahead, into memory that is used again, and taken once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from obfuscatune.enclave.keys import SecretStream, _renew_fresh_streams
from obfuscatune.enclave.mixer import FEW_AHEAD, KroneckerMixer, NoMixer
from obfuscatune.enclave.mixing import DENSE_BELOW, FewMixing

SHIELD = 8


def secrets(mixing: FewMixing | None, rows: int) -> tuple[float, float]:
    """A number of each secret: of what mixes, and of the shield."""
    assert mixing is not None
    return mixing.secrets.Q[0, 0].item(), mixing.secrets.stack[rows, 0].item()


def test_what_was_drawn_ahead_is_taken_once() -> None:
    """Into memory that was given back; else it would be allocated for each crossing anew."""
    mixer, taken, places = KroneckerMixer(SHIELD, SecretStream.fresh()), [], set()
    for _ in range(3 * FEW_AHEAD):
        mixing = mixer.draw_few(3, 100, torch.float64)
        assert mixing is not None
        taken += secrets(mixing, 3)
        places.add(mixing.secrets.stack.data_ptr())
        mixer.give_back(mixing)
        mixer.draw_ahead(mixing)
    assert len(set(taken)) == 6 * FEW_AHEAD
    assert len(places) == 1


def test_what_is_in_use_is_not_drawn_into() -> None:
    mixer = KroneckerMixer(SHIELD, SecretStream.fresh())
    in_use = [mixer.draw_few(3, 100, torch.float64) for _ in range(5)]
    before = [secrets(mixing, 3) for mixing in in_use]
    assert in_use[0] is not None
    for _ in range(5):
        mixer.draw_ahead(in_use[0])  # nothing was given back
    assert len({mixing.secrets.stack.data_ptr() for mixing in in_use if mixing is not None}) == 5
    assert [secrets(mixing, 3) for mixing in in_use] == before
    assert len({number for pair in before for number in pair}) == 10
    mixer.give_back(in_use[0])
    for _ in range(3):
        mixer.draw_ahead(in_use[0])  # once at most into what one gave back
    again = [mixer.draw_few(3, 100, torch.float64) for _ in range(3)]
    assert len({mixing.secrets.stack.data_ptr() for mixing in [*in_use, *again] if mixing is not None}) == 7


def test_what_was_drawn_ahead_is_for_one_shape_and_dtype() -> None:
    mixer = KroneckerMixer(SHIELD, SecretStream.fresh())
    keys = [(3, 100, torch.float64), (3, 100, torch.float32), (4, 100, torch.float64), (3, 101, torch.float64)]
    for key in 2 * keys:
        mixing = mixer.draw_few(*key)
        assert mixing is not None
        rows, width, dtype = key
        assert (mixing.secrets.stack.shape, mixing.secrets.stack.dtype) == ((rows + SHIELD, width), dtype)
        assert (mixing.secrets.Q.shape, mixing.secrets.Q.dtype) == ((rows + SHIELD, rows + SHIELD), dtype)
        mixer.give_back(mixing)
        mixer.draw_ahead(mixing)


def test_a_forked_child_takes_nothing_that_its_parent_drew_ahead() -> None:
    """Else the child would mix as its parent does, and the difference of their rows would show."""
    mixer = KroneckerMixer(SHIELD, SecretStream.fresh())
    mixings = [mixer.draw_few(3, 100, torch.float64) for _ in range(4)]
    for mixing in mixings:
        assert mixing is not None
        mixer.give_back(mixing)
        mixer.draw_ahead(mixing)
    kept = {number for ready in mixer._few._ready.values() for mixing in ready for number in secrets(mixing, 3)}
    kept |= {Q[0, 0].item() for ready in mixer._factors._ready.values() for Q in ready}
    assert len(kept) > 4
    _renew_fresh_streams()  # what runs in a forked child
    for _ in range(6):
        mixing = mixer.draw_few(3, 100, torch.float64)
        assert kept.isdisjoint(secrets(mixing, 3))
        assert mixing is not None
        mixer.draw_ahead(mixing)


def test_threads_take_other_secrets() -> None:
    mixer = KroneckerMixer(SHIELD, SecretStream.fresh())

    def take(_: int) -> tuple[float, float]:
        mixing = mixer.draw_few(3, 70, torch.float32)
        assert mixing is not None
        found = secrets(mixing, 3)
        mixer.give_back(mixing)
        mixer.draw_ahead(mixing)
        return found

    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(take, range(400)))
    assert len({Q for Q, _ in taken}) == 400


def test_the_last_one_may_be_taken_by_another_thread() -> None:
    """Between a look whether there is one and the taking."""

    class Raced(list[FewMixing]):
        def pop(self, *_: object) -> FewMixing:
            raise IndexError

    mixer, key = KroneckerMixer(SHIELD, SecretStream.fresh()), (3, 100, torch.float64)
    mixing = mixer.draw_few(*key)
    assert mixing is not None
    mixer._few._ready[key] = Raced([mixing])
    assert secrets(mixer.draw_few(*key), 3) != secrets(mixing, 3)


def test_how_many_rows_are_few() -> None:
    """With the shield's, as many as one dense factor mixes; none at full rank, and none where nothing is mixed."""
    most = DENSE_BELOW - SHIELD
    mixer = KroneckerMixer(SHIELD, SecretStream.fresh())
    assert [mixer.draw_few(rows, 70, torch.float32) is not None for rows in (1, most, most + 1)] == [True, True, False]
    full = KroneckerMixer(SHIELD, SecretStream.fresh(), full_rank=True)
    assert full.draw_few(1, 70, torch.float32) is None
    assert NoMixer().draw_few(1, 70, torch.float32) is None
