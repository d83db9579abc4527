"""Workers of a fleet, in threads of this process, that do what a test asks of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from obfuscatune.backend import Computer
from obfuscatune.bench.drift_worker import serving
from obfuscatune.enclave.fleet import FleetClient, open_fleet
from obfuscatune.fleet.fleet_file import Fleet
from obfuscatune.fleet.placement import Plan

SECONDS = 20.0
"""For anything here: far more than it takes, far less than for ever."""


class Member(Computer):
    """Honest and fast, until a test says otherwise."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.lie: float = 0.0
        """Added to one element of every product, as a multiple of the product's size."""
        self.free = threading.Event()
        """Products are computed while it is set."""
        self.free.set()
        self.products = 0

    def multiply(self, rows: Tensor, matrix: Tensor, out: Tensor, *, transpose: bool) -> None:
        self.free.wait(SECONDS)
        super().multiply(rows, matrix, out, transpose=transpose)
        self.products += 1
        if self.lie:
            out[0, 0] += self.lie * (1 + out.abs().max())


@dataclass
class Made:
    """A fleet, its workers by address, and what it told."""

    client: FleetClient
    members: dict[str, Member]
    notices: list[str] = field(default_factory=list)

    def named(self, text: str) -> list[str]:
        """Addresses in notices that say `text`."""
        return [address for address in self.members for line in self.notices if address in line and text in line]


@contextmanager
def members(count: int) -> Iterator[dict[str, Member]]:
    """Workers that listen, by address."""
    with ExitStack() as stack:
        made = [Member() for _ in range(count)]
        yield {stack.enter_context(serving(it)): it for it in made}


@contextmanager
def made(count: int, plan: Plan, *, hedge: bool = True, patience_s: float = SECONDS) -> Iterator[Made]:
    """A fleet of `count` workers."""
    with members(count) as them:
        notices: list[str] = []
        fleet = replace(Fleet.of_addresses(list(them)), plan=plan, hedge=hedge)
        with open_fleet(fleet, notice=notices.append, patience_s=patience_s) as client:
            try:
                yield Made(client, them, notices)
            finally:
                for it in them.values():
                    it.free.set()


def stored(client: FleetClient, W: Tensor, matrix_id: bytes = b"m" * 16) -> bytes:
    """W in the fleet; its id."""
    client.store(matrix_id, W.clone, shape=(W.shape[0], W.shape[1]), dtype=W.dtype, tensor=W.clone())
    return matrix_id


def holders(made: Made) -> list[Sequence[str]]:
    """Of each shard, in the order of columns."""
    return [shard.holders for shard in made.client.placement()]
