"""A process that does its work each time it is told to, so that several take turns on an idle machine.

run as:  python -m obfuscatune.bench.bench_process '{"kind": "plain", ...}'
reads a line:  step | profile | count | limits | quit      answers a line of JSON
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from typing import Any

from obfuscatune.process import settle_process

settle_process()  # the same for plain and protected; the wait policy is what the parent says

# ruff: noqa: E402 - torch reads the environment when it is imported
import torch

from obfuscatune.bench.clocked import ClockPage
from obfuscatune.bench.link import linked_worker
from obfuscatune.bench.measures import ProductCounter, measure_limits, measured_spans
from obfuscatune.bench.processes import peak_bytes, settled_bytes
from obfuscatune.bench.workload import ALL_AHEAD, WORKLOADS, Workload, config_of, random_model
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.enclave.masks import Masks
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protection import Protection


def main() -> None:
    """Build the model as the JSON argument says, then obey standard input."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    config = config_of(settings["shape"], settings["layers"])
    with ExitStack() as stack:
        model = random_model(config)
        worker = clock = mask_clock = protection = None
        if settings["kind"] == "protected":
            where = settings["link"], settings["threads"], settings["namespace"]
            client, worker, clock = stack.enter_context(linked_worker(*where))
            mask_client = None
            if resolve(settings["profile"]).masks:
                mask_client, _, mask_clock = stack.enter_context(linked_worker(*where))
            masking = ALL_AHEAD if settings["masks_ahead"] else None
            protection = protect(
                model, client, settings["profile"], base="closed", mask_worker=mask_client, masking=masking
            ).protection
        work = WORKLOADS[settings["work"]](model, settings["batch"], settings["length"])
        stocked = protection.masks if settings["masks_ahead"] and protection is not None else None
        side = _Side(work, protection, worker, clock, mask_clock, stocked)
        words = {"step": side.step, "profile": side.profile, "count": side.count}
        _say({"ready": True})
        for line in sys.stdin:
            word = line.strip()
            if word == "quit":
                break
            _say(asdict(measure_limits()) if word == "limits" else words[word]())


class _Side:
    """The work, and the worker that helps with it where one does."""

    def __init__(
        self,
        work: Workload,
        protection: Protection | None,
        worker: LocalWorker | None,
        clock: ClockPage | None,
        mask_clock: ClockPage | None,
        stocked: Masks | None,
    ) -> None:
        """`stocked`: masks that are all to be drawn before what is timed; None for none."""
        self._work, self._protection, self._worker, self._clock = work, protection, worker, clock
        self._mask_clock, self._stocked = mask_clock, stocked

    def step(self) -> dict[str, Any]:
        """Once, timed; and all that can be had without disturbing it."""
        with self._prepared():
            return self._timed()

    def _prepared(self) -> AbstractContextManager[None]:
        """Do what comes before the work; within the `with` is what is measured."""
        self._work.prepare()
        return nullcontext() if self._stocked is None else self._stocked.stocked(self._work.requests_alike)

    def _timed(self) -> dict[str, Any]:
        before = None if self._protection is None else self._protection.stats.snapshot()
        computed = None if self._clock is None else self._clock.totals
        masked = None if self._mask_clock is None else self._mask_clock.totals
        started = time.perf_counter()
        result = self._work()
        answer: dict[str, Any] = {"seconds": time.perf_counter() - started, "result": result}
        answer |= {"peak_bytes": peak_bytes(), "resident_bytes": settled_bytes()}
        if self._protection is not None and before is not None:
            crossed = self._protection.stats.since(before)
            answer["waiting_seconds"] = crossed.seconds_waiting
            answer["crossings"] = crossed.crossings
            answer["bytes"] = crossed.bytes_sent + crossed.bytes_received
        if self._worker is not None and self._clock is not None and computed is not None:
            answer["worker_seconds"] = self._clock.totals.since(computed).seconds
            if self._mask_clock is not None and masked is not None:
                answer["mask_worker_seconds"] = self._mask_clock.totals.since(masked).seconds
            answer["worker_peak_bytes"] = peak_bytes(self._worker.pid)
            answer["worker_resident_bytes"] = settled_bytes(self._worker.pid)
        return answer

    def profile(self) -> dict[str, Any]:
        """Once under the profiler; its time is not to be compared."""
        with self._prepared(), measured_spans() as spans:
            self._work()
        return {"spans": spans}

    def count(self) -> dict[str, Any]:
        """Once, with all products counted; its time is not to be compared."""
        self._work.prepare()
        clock = self._clock
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
