"""`bench fleet`: throughput against the number of workers, each throttled to a known rate.

    shards     one stream of forward passes; each product is computed by all workers together
    replicas   two streams for each worker; each product is computed by one of them

Linear is the throughput with one worker, times their number. What keeps a fleet from it is the enclave's own part: CPU
time of the enclave's process, which is measured. One stream's pass takes at least that long beside the workers' part;
many streams' throughput is bounded by the cores over it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import GPT2Config

from obfuscatune.bench.measures import cpu_seconds
from obfuscatune.bench.throttled_worker import throttled_workers
from obfuscatune.bench.workload import random_model
from obfuscatune.enclave.protect import protect
from obfuscatune.fleet.fleet_file import Fleet
from obfuscatune.fleet.placement import ALL, Plan
from obfuscatune.machine import cores
from obfuscatune.report.page import environment, markdown_table

PLANS = {"shards": Plan(), "replicas": Plan(ALL, shard=False)}
VOCABULARY = 512
"""Small: the head stays in the enclave, and its part is not what is measured here."""
STREAMS = 2
"""For each worker, with replicas."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class FleetRow:
    """What one fleet did."""

    placement: str
    workers: int
    passes: int
    seconds: float
    enclave_cpu_seconds: float
    hedged: int

    @property
    def throughput(self) -> float:
        """Passes a second."""
        return self.passes / self.seconds

    @property
    def own_seconds(self) -> float:
        """CPU time of the enclave's process for a pass."""
        return self.enclave_cpu_seconds / self.passes


@dataclass(frozen=True)
class FleetBench:
    """What is measured: forward passes of a model with `layers` blocks of `width`, under `private`."""

    workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    rate: float = 0.2
    width: int = 1024
    layers: int = 1
    batch: int = 1
    length: int = 64
    rounds: int = 1
    placements: tuple[str, ...] = tuple(PLANS)

    def run(self, progress: Progress) -> FleetResult:
        """Measure; about three minutes with the defaults."""
        rows = []
        for count in self.workers:
            with throttled_workers(count, self.rate) as addresses:
                for placement in self.placements:
                    row = self._run(placement, addresses)
                    rows.append(row)
                    progress(f"{placement}, {count} workers: {row.throughput:.3g} passes a second")
        return FleetResult(asdict(self), rows, environment(torch.get_num_threads()))

    def config(self) -> GPT2Config:
        """Of the model."""
        return GPT2Config(
            vocab_size=VOCABULARY, n_positions=self.length, n_embd=self.width, n_layer=self.layers,
            n_head=max(1, self.width // 64), bos_token_id=0, eos_token_id=0,
        )  # fmt: skip

    def _run(self, placement: str, addresses: list[str]) -> FleetRow:
        fleet = replace(Fleet.of_addresses(addresses), plan=PLANS[placement])
        ids = torch.arange(self.batch * self.length).view(self.batch, self.length) % VOCABULARY
        workers = fleet if len(addresses) > 1 else addresses[0]
        with protect(random_model(self.config()).eval(), workers, base="closed", first_blocks=0) as model:
            streams = 1 if placement == "shards" else STREAMS * len(addresses)

            def work(passes: int) -> None:
                with torch.inference_mode():
                    for _ in range(passes):
                        model(ids)

            work(1)
            before = cpu_seconds()
            started = time.monotonic()
            threads = [threading.Thread(target=work, args=(self.rounds,)) for _ in range(streams)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds, own = time.monotonic() - started, cpu_seconds() - before
            hedged = getattr(model.protection.stats, "hedged", 0)
        return FleetRow(placement, len(addresses), streams * self.rounds, seconds, own, hedged)


@dataclass(frozen=True)
class FleetResult:
    """What was measured."""

    settings: dict[str, Any]
    rows: list[FleetRow]
    environment: dict[str, Any]

    def of_linear(self, row: FleetRow) -> float | None:
        """Throughput over that of the smallest fleet, times the number of workers; None where there is no other."""
        first = min((it for it in self.rows if it.placement == row.placement), key=lambda it: it.workers)
        return None if first is row else row.throughput / first.throughput * first.workers / row.workers

    def limit(self, row: FleetRow) -> float:
        """Share of the time that the enclave's own part takes: of a pass, or of all cores with many streams."""
        parallel = 1 if row.placement == "shards" else cores()
        return row.own_seconds * row.throughput / parallel

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        rows = [
            asdict(row)
            | {"throughput": row.throughput, "of_linear": self.of_linear(row), "enclave_share": self.limit(row)}
            for row in self.rows
        ]
        return {"kind": "fleet", "settings": self.settings, "rows": rows, "environment": self.environment}

    def as_markdown(self) -> str:
        """What people read."""
        header = ["placement", "workers", "passes a second", "of linear", "enclave, CPU ms a pass", "enclave's share"]
        cells = [
            [
                row.placement,
                str(row.workers),
                f"{row.throughput:.3g}",
                "" if (share := self.of_linear(row)) is None else f"{share:.0%}",
                f"{1e3 * row.own_seconds:.1f}",
                f"{self.limit(row):.0%}",
            ]
            for row in self.rows
        ]
        return (
            f"Workers throttled to {self.settings['rate']:g} GFLOP/s each; forward passes of "
            f"{self.settings['layers']} blocks of width {self.settings['width']}, "
            f"{self.settings['batch']} x {self.settings['length']} tokens.\n\n{markdown_table(header, cells)}\n\n"
            "The enclave's share is what its own part takes of a pass (shards: one stream), or of its cores (replicas: "
            "many streams). It is the limit as it nears 100 %.\n"
        )
