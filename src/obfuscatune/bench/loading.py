"""A fresh process that loads one model from its files under protection, and says what that took.

run as:  python -m obfuscatune.bench.loading '{"model": ..., "profile": ..., ...}'     answers one JSON document
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict

from obfuscatune.process import settle_process

settle_process()

# ruff: noqa: E402 - torch reads the environment when it is imported
import torch

from obfuscatune.bench.kept_memory import KeptMemory
from obfuscatune.bench.processes import MemorySampler, cpu_seconds, peak_bytes, settled_bytes, shared_bytes
from obfuscatune.enclave.loading import load
from obfuscatune.enclave.local_worker import local_worker
from obfuscatune.enclave.observer import StageClock
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.protect import Progress


def main() -> None:
    """Load with worker processes beside it, as the JSON argument says: so many of each party, as a fleet."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    clock, dtype = StageClock(), getattr(torch, settings["dtype"])
    profile = resolve(settings["profile"], **settings["knobs"])
    with ExitStack() as stack:
        parties = [
            [stack.enter_context(local_worker(threads=settings["threads"])) for _ in range(settings["workers"])]
            for _ in range(2 if profile.masks else 1)
        ]
        workers = parties[0]
        addresses = [[worker.address for worker in party] for party in parties]
        progress = _giving_back(stack, settings["kept_bytes"])
        before = settled_bytes()
        computed, computed_by_workers = cpu_seconds(), sum(cpu_seconds(worker.pid) for worker in workers)
        started = time.perf_counter()
        with MemorySampler() as sampled:
            model = load(
                settings["model"],
                addresses[0],
                profile,
                dtype=dtype,
                clock=clock,
                progress=progress,
                base="closed",  # random weights of a known shape
                mask_worker=addresses[1] if profile.masks else None,
            )
        seconds = time.perf_counter() - started
        own = {id(parameter): parameter for parameter in model.parameters()}.values()
        stats = model.protection.stats
        answer = {
            "seconds": seconds,
            "enclave_cpu_seconds": cpu_seconds() - computed,
            "worker_cpu_seconds": sum(cpu_seconds(worker.pid) for worker in workers) - computed_by_workers,
            "stages": asdict(clock),
            "bytes_uploaded": stats.bytes_uploaded,
            "matrices": stats.uploads,
            "enclave_parameters": sum(parameter.numel() for parameter in own),
            "enclave_bytes": sum(parameter.nbytes for parameter in own),
            "parameters": sum(parameter.numel() for parameter in own)
            + stats.bytes_uploaded // profile.crossing_dtype(dtype).itemsize,
            "before_bytes": before,
            "enclave_peak_bytes": peak_bytes(),
            "enclave_anonymous_peak_bytes": sampled.anonymous_bytes,
            "enclave_shared_bytes": shared_bytes(),  # of the peak: no page of it is given back before the end
            "worker_peak_bytes": max(peak_bytes(worker.pid) for worker in workers),
        }
        model.protection.close()
    print(json.dumps(answer))  # noqa: T201 - the answer to the parent


def _giving_back(stack: ExitStack, nbytes: int) -> Progress | None:
    """What lets so many bytes go, held by another process, as the worker takes them; None for none."""
    if not nbytes:
        return None
    kept = stack.enter_context(KeptMemory(nbytes))
    kept.keep_ahead_of(0)
    return lambda done, total, name: kept.keep_ahead_of(nbytes * done // total)


if __name__ == "__main__":
    main()
