"""Adapters that live on the worker, each session's apart from every other's: factors, gradients, moments, and what the
backward passes to come need. All of it counts towards the quota of the matrices, and goes when its session goes.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from obfuscatune.errors import AdapterLost
from obfuscatune.protocol.limits import MAX_ADAPTERS, MAX_KEPT_FORWARDS
from obfuscatune.protocol.messages import ErrorCode
from obfuscatune.protocol.payloads import PARTS, Attachment, Part, Slice, Step
from obfuscatune.worker.lora import Factors, Kept, kept_bytes, take_step
from obfuscatune.worker.quota import Claim, SessionKey
from obfuscatune.worker.replies import RequestError
from obfuscatune.worker.store import Key, MatrixStore


@dataclass
class Adapter:
    """One adapter: of a stored matrix (p, q), with factors for some of its columns."""

    attachment: Attachment
    shape: tuple[int, int]
    dtype: torch.dtype
    factors: tuple[Factors, ...]
    claim: Claim
    store: MatrixStore
    lock: threading.Lock = field(default_factory=threading.Lock)
    _forwards: OrderedDict[int, tuple[Kept, Claim]] = field(default_factory=OrderedDict)
    _dropped: bool = False

    def part(self, number: int) -> torch.Tensor:
        """The matrix that a header names.

        Raises:
            RequestError: the adapter has no such slice.
        """
        index, part = Part.named(number)
        if index >= len(self.factors):
            raise RequestError(
                ErrorCode.SHAPE, f"this adapter has {len(self.factors)} slices, slice {index} was asked for"
            )
        return self.factors[index].part(part)

    def remember(self, number: int, kept: Kept) -> None:
        """Keep what the backward pass of forward pass `number` needs, in place of what was there.

        Raises:
            QuotaExceeded: there is no room for it.
            AdapterLost: the adapter was forgotten meanwhile.
        """
        claim = self.store.reserve(self.claim.session, kept_bytes(kept))
        with self.lock:
            if not self._dropped:
                self._let_go(number)
                self._forwards[number] = kept, claim
                while len(self._forwards) > MAX_KEPT_FORWARDS:
                    self._let_go(next(iter(self._forwards)))
                return
        claim.release()
        raise lost()

    def take(self, number: int) -> Kept:
        """What forward pass `number` left, once.

        Raises:
            AdapterLost: it left nothing, or its backward pass came already.
        """
        with self.lock:
            if number not in self._forwards:
                raise AdapterLost("nothing is kept of that forward pass (any longer)")
            kept = self._forwards[number][0]
            self._let_go(number)
            return kept

    def step(self, settings: Step) -> None:
        """Move the factors against their gradients."""
        with self.lock, torch.inference_mode():
            for factors in self.factors:
                for moved in factors.moved():
                    take_step(moved, settings)

    def zero(self) -> None:
        """Gradients to zero; forward passes without their backward pass are let go."""
        with self.lock, torch.inference_mode():
            for factors in self.factors:
                for moved in factors.moved():
                    moved.gradient.zero_()
            for number in list(self._forwards):
                self._let_go(number)

    def squared_norm(self) -> float:
        """Sum of squares of all gradients, in float64."""
        with self.lock, torch.inference_mode():
            norms = [
                torch.linalg.vector_norm(moved.gradient, dtype=torch.float64)
                for factors in self.factors
                for moved in factors.moved()
            ]
            return sum(float(norm) ** 2 for norm in norms)

    def drop(self) -> None:
        """Give back all that it claimed."""
        with self.lock:
            self._dropped = True
            for number in list(self._forwards):
                self._let_go(number)
            self.claim.release()

    def _let_go(self, number: int) -> None:
        _, claim = self._forwards.pop(number, (None, None))
        if claim is not None:
            claim.release()


class AdapterStore:
    """Adapters by (session, adapter id). Safe from any thread."""

    def __init__(self, store: MatrixStore, device: torch.device) -> None:
        """`store`: whose quota they count towards, and whose sessions they go with."""
        self._store = store
        self._device = device
        self._held: dict[Key, Adapter] = {}
        self._lock = threading.Lock()
        store.depend(self)

    def attach(self, key: Key, attachment: Attachment, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Make room for an adapter, all of it zero, in place of one under the same key.

        Raises:
            QuotaExceeded: there is no room.
            RequestError: the session has too many.
        """
        self.forget(key)
        size = sum(_bytes_of(it, shape[0], dtype) for it in attachment.slices)
        claim = self._store.reserve(key[0], size)
        try:
            factors = tuple(Factors.zeros(it, shape[0], dtype, self._device) for it in attachment.slices)
            before = self._put(key, Adapter(attachment, shape, dtype, factors, claim, self._store))
        except BaseException:
            claim.release()
            raise
        if before is not None:  # another connection of the session attached it meanwhile
            before.drop()

    def _put(self, key: Key, adapter: Adapter) -> Adapter | None:
        """Hold an adapter; the one that was held under this key."""
        with self._lock:
            before = self._held.get(key)
            if before is None and sum(held[0] == key[0] for held in self._held) >= MAX_ADAPTERS:
                raise RequestError(ErrorCode.LIMIT, f"a session has at most {MAX_ADAPTERS} adapters")
            self._held[key] = adapter
            return before

    def get(self, key: Key) -> Adapter:
        """The adapter under `key`.

        Raises:
            AdapterLost: it was never attached, or forgotten, or another session attached it.
        """
        with self._lock:
            if key not in self._held:
                raise lost()
            return self._held[key]

    def named(self, key: Key, *, every: bool) -> list[Adapter]:
        """The adapter under `key`; or, where `every`, all of its session.

        Raises:
            AdapterLost: there is none.
        """
        if not every:
            return [self.get(key)]
        with self._lock:
            found = [adapter for held, adapter in self._held.items() if held[0] == key[0]]
        if not found:
            raise lost()
        return found

    def forget(self, key: Key) -> None:
        """Drop one adapter; none is fine."""
        with self._lock:
            adapter = self._held.pop(key, None)
        if adapter is not None:
            adapter.drop()

    def forget_session(self, session: SessionKey) -> None:
        """Drop all that a session attached."""
        with self._lock:
            keys = [key for key in self._held if key[0] == session]
        for key in keys:
            self.forget(key)


def lost() -> AdapterLost:
    """The same words for what was never there, was forgotten, or is another session's."""
    return AdapterLost("this session has no such adapter here (any longer)")


def _bytes_of(it: Slice, p: int, dtype: torch.dtype) -> int:
    """Factors, gradients, and two moments of each: `PARTS` counts both factors with their moments."""
    return (PARTS + 2) // 2 * it.rank * (p + it.width) * dtype.itemsize
