"""A process that does its work each time it is told to, so that contenders take turns on an idle machine.

run as:  python -m obfuscatune.bench.contender '{"kind": "plain", ...}'
reads a line:  step | profile | count | limits | quit      answers a line of JSON
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from obfuscatune.process import settle_process

settle_process()  # the same for plain and protected; the wait policy is what the parent says

# ruff: noqa: E402 - torch reads the environment when it is imported
import torch

from obfuscatune.bench.clocked import ClockedWorker, clocked_worker
from obfuscatune.bench.limits import measure_limits
from obfuscatune.bench.products import ProductCounter
from obfuscatune.bench.shapes import config_of
from obfuscatune.bench.spans import measured_spans
from obfuscatune.bench.usage import peak_bytes, settled_bytes
from obfuscatune.bench.workload import WORKLOADS, Workload, random_model
from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protection import Protection


def main() -> None:
    """Build the model as the JSON argument says, then obey standard input."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    config = config_of(settings["shape"], settings["layers"])
    with ExitStack() as stack:
        model = random_model(config)
        worker = protection = None
        if settings["kind"] == "protected":
            worker = stack.enter_context(clocked_worker(settings["threads"]))
            protection = protect(model, worker.address, settings["profile"], base="closed").protection
        side = _Side(WORKLOADS[settings["work"]](model, settings["batch"], settings["length"]), worker, protection)
        words = {"step": side.step, "profile": side.profile, "count": side.count}
        _say({"ready": True})
        for line in sys.stdin:
            word = line.strip()
            if word == "quit":
                break
            _say(asdict(measure_limits()) if word == "limits" else words[word]())


class _Side:
    """The work, and the worker that helps with it where one does."""

    def __init__(self, work: Workload, worker: ClockedWorker | None, protection: Protection | None) -> None:
        self._work, self._worker, self._protection = work, worker, protection

    def step(self) -> dict[str, Any]:
        """Once, timed; and all that can be had without disturbing it."""
        self._work.prepare()
        before = None if self._protection is None else self._protection.stats.snapshot()
        clock = None if self._worker is None else self._worker.clock.totals
        started = time.perf_counter()
        result = self._work()
        answer: dict[str, Any] = {"seconds": time.perf_counter() - started, "result": result}
        answer |= {"peak_bytes": peak_bytes(), "resident_bytes": settled_bytes()}
        if self._protection is not None and before is not None:
            crossed = self._protection.stats.since(before)
            answer["waiting_seconds"] = crossed.seconds_waiting
            answer["crossings"] = crossed.crossings
            answer["bytes"] = crossed.bytes_sent + crossed.bytes_received
        if self._worker is not None and clock is not None:
            answer["worker_seconds"] = self._worker.clock.totals.since(clock).seconds
            answer["worker_peak_bytes"] = peak_bytes(self._worker.pid)
            answer["worker_resident_bytes"] = settled_bytes(self._worker.pid)
        return answer

    def profile(self) -> dict[str, Any]:
        """Once under the profiler; its time is not to be compared."""
        self._work.prepare()
        with measured_spans() as spans:
            self._work()
        return {"spans": spans}

    def count(self) -> dict[str, Any]:
        """Once, with all products counted; its time is not to be compared."""
        self._work.prepare()
        clock = None if self._worker is None else self._worker.clock
        if clock is not None:
            clock.counting = True
            before = clock.totals
        with ProductCounter() as products:
            self._work()
        answer: dict[str, Any] = {"flops": products.flops, "bytes": products.nbytes}
        if clock is not None:
            counted = clock.totals.since(before)
            clock.counting = False
            answer |= {"worker_flops": int(counted.flops), "worker_bytes": int(counted.nbytes)}
        return answer


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)  # noqa: T201 - the protocol with the parent


if __name__ == "__main__":
    main()
