"""`bench fleet`: throughput against the number of workers, each throttled to a known rate.

    shards     one stream of forward passes; each product is computed by all workers together
    replicas   two streams for each worker; each product is computed by one of them

Linear is the throughput with one worker, times their number. What keeps a fleet from it in the end is the enclave's own
part: CPU time of its process, which is measured. One stream's pass takes that long beside the workers' part; many
streams' throughput is bounded by the cores over it. Throughput is counted from the beginning until the first stream has
done its passes: while all streams run.
"""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import GPT2Config

from obfuscatune.bench.processes import Progress, cpu_seconds
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
NEAR_LINEAR = 0.85
"""Of linear: below that something else than the workers is the limit."""


@dataclass(frozen=True)
class FleetRow:
    """What one fleet did."""

    placement: str
    workers: int
    passes: float
    """Products over those of a pass: some streams are in the middle of one."""
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

            def counted() -> tuple[float, float, int]:
                return time.monotonic(), cpu_seconds(), model.protection.stats.crossings

            beginning = counted()
            work(1)
            products_of_a_pass = counted()[2] - beginning[2]
            with ThreadPoolExecutor(streams) as pool:
                beginning = counted()
                running = [pool.submit(work, self.rounds) for _ in range(streams)]
                wait(running, return_when=FIRST_COMPLETED)
                seconds, own, products = (now - then for now, then in zip(counted(), beginning, strict=True))
                for stream in running:
                    stream.result()
            hedged = getattr(model.protection.stats, "hedged", 0)
        return FleetRow(placement, len(addresses), products / products_of_a_pass, seconds, own, hedged)


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

    def share(self, row: FleetRow) -> float:
        """What the enclave's own part takes: of a pass, or of all cores with many streams."""
        parallel = 1 if row.placement == "shards" else cores()
        return row.own_seconds * row.throughput / parallel

    def limit(self, row: FleetRow) -> str:
        """What the throughput is bounded by: the workers while it is near linear, then the enclave if that explains it.

        One stream waits for the enclave's own part in each pass, so what that takes of a pass is what is lost. Many
        streams wait for it only when it takes nearly all cores.
        """
        if (self.of_linear(row) or 1.0) >= NEAR_LINEAR:
            return "workers"
        explains = 1 - NEAR_LINEAR if row.placement == "shards" else NEAR_LINEAR
        return "enclave" if self.share(row) >= explains else "neither"

    def most_workers(self, placement: str) -> int:
        """How many such workers the enclave can feed before it is the limit, by its share beside the largest fleet."""
        row = max((it for it in self.rows if it.placement == placement), key=lambda it: it.workers)
        share = self.share(row)
        if placement == "shards":  # of a pass; the workers' part of it gets shorter, its own does not
            return int(row.workers * (1 - share) / share * (1 - NEAR_LINEAR) / NEAR_LINEAR)
        return int(row.workers * NEAR_LINEAR / share)

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        rows = [
            asdict(row)
            | {
                "throughput": row.throughput,
                "of_linear": self.of_linear(row),
                "enclave_share": self.share(row),
                "limit": self.limit(row),
            }
            for row in self.rows
        ]
        most = {it: self.most_workers(it) for it in self.settings["placements"]}
        return {
            "kind": "fleet",
            "settings": self.settings,
            "rows": rows,
            "most_workers": most,
            "environment": self.environment,
        }

    def as_markdown(self) -> str:
        """What people read."""
        header = ["placement", "workers", "passes a second", "of linear", "hedged", "enclave, CPU ms a pass",
                  "enclave's share", "limit"]  # fmt: skip
        cells = [
            [
                row.placement,
                str(row.workers),
                f"{row.throughput:.3g}",
                "" if (of_linear := self.of_linear(row)) is None else f"{of_linear:.0%}",
                str(row.hedged),
                f"{1e3 * row.own_seconds:.1f}",
                f"{self.share(row):.0%}",
                self.limit(row),
            ]
            for row in self.rows
        ]
        most = " and ".join(f"{self.most_workers(it)} with {it}" for it in self.settings["placements"])
        return (
            f"Workers throttled to {self.settings['rate']:g} GFLOP/s each; forward passes of "
            f"{self.settings['layers']} blocks of width {self.settings['width']}, "
            f"{self.settings['batch']} x {self.settings['length']} tokens.\n\n{markdown_table(header, cells)}\n\n"
            "The enclave's share is what its own part takes of a pass (shards: one stream), or of its cores (replicas: "
            f"many streams). Workers are the limit while throughput is within {NEAR_LINEAR:.0%} of linear. By these "
            f"shares it is the enclave beyond about so many workers of this speed: {most}.\n"
        )
