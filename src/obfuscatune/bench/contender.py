"""A process that does its work each time it is told to, so that contenders take turns on an idle machine.

run as:  python -m obfuscatune.bench.contender '{"kind": "plain", ...}'
reads a line:  step | profile | quit      answers a line of JSON
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from obfuscatune.process import settle_process

settle_process()  # the same for plain and protected; the wait policy is what the parent says

# ruff: noqa: E402 - torch reads the environment when it is imported
import torch

from obfuscatune.bench.shapes import config_of
from obfuscatune.bench.workload import WORKLOADS, random_model
from obfuscatune.enclave.local import local_worker
from obfuscatune.enclave.protect import protect


def main() -> None:
    """Build the model as the JSON argument says, then obey standard input."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    config = config_of(settings["shape"], settings["layers"])
    with ExitStack() as stack:
        model = random_model(config)
        protection = None
        if settings["kind"] == "protected":
            worker = stack.enter_context(local_worker(threads=settings["threads"]))
            protection = protect(model, worker.address, settings["profile"]).protection
        work = WORKLOADS[settings["work"]](model, settings["batch"], settings["length"])
        _say({"ready": True})
        for line in sys.stdin:
            if line.strip() == "quit":
                break
            work.prepare()
            before = protection.stats.snapshot() if protection else None
            with _spans() if line.strip() == "profile" else nullcontext() as spans:
                started = time.perf_counter()
                result = work()
                seconds = time.perf_counter() - started
            answer: dict[str, Any] = {
                "seconds": seconds,
                "result": result,
                "spans": spans,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            if protection and before:
                crossed = protection.stats.since(before)
                answer["waiting_seconds"] = crossed.seconds_waiting
                answer["crossings"] = crossed.crossings
                answer["bytes"] = crossed.bytes_sent + crossed.bytes_received
            _say(answer)


@contextmanager
def _spans() -> Iterator[dict[str, float]]:
    """Seconds that pass inside each of the enclave's own spans, `obfuscatune.*`; filled in at the end."""
    spans: dict[str, float] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        yield spans
    for event in profiler.key_averages():
        if event.key.startswith("obfuscatune."):
            spans[event.key.removeprefix("obfuscatune.")] = event.cpu_time_total / 1e6


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)  # noqa: T201 - the protocol with the parent


if __name__ == "__main__":
    main()
