"""What `advise` predicts, beside what is measured of the same work in the same process, in turns.

Time is that of the processors, the workers' and the enclave's together: what else runs on the machine takes none of it.
What it does to caches slows plain and protected alike, and cancels in their ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from obfuscatune.advise.advice import Advice, Question, advise
from obfuscatune.advise.work import KINDS, Kind
from obfuscatune.bench.fleet import FleetBench
from obfuscatune.bench.link import UNIX, linked_worker
from obfuscatune.bench.throttled_worker import throttled_workers
from obfuscatune.bench.workload import WORKLOADS, Workload, random_model
from obfuscatune.enclave.client import open_link
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protection import Masking

pytestmark = pytest.mark.long
ROUNDS, BETWEEN = 6, 3
"""Timed plain and protected, in turns; and after how many of them it is predicted again."""
OFF_BY = 0.3
"""A prediction may be off by so much of the ratio: work and speeds are coarse models, and no round is as the last."""
SIZES: dict[Kind, tuple[int, int]] = {"step": (1, 128), "forward": (1, 128), "decode": (4, 32)}


def gpt2() -> PretrainedConfig:
    return GPT2Config(n_layer=3, vocab_size=2048, n_positions=256, bos_token_id=0, eos_token_id=0)


def llama() -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=2048,
    )  # fmt: skip


def seconds_of(work: Workload) -> float:
    work.prepare()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def silent(_: str) -> None:
    pass


def processor_seconds(*pids: int) -> Callable[[], float]:
    """A clock: what this process and these have computed so far."""
    clocks = [time.CLOCK_PROCESS_CPUTIME_ID, *((~pid << 3) | 2 for pid in pids)]  # as Linux numbers other processes'
    return lambda: sum(map(time.clock_gettime, clocks))


@pytest.mark.parametrize("shape", [gpt2, llama])
@pytest.mark.parametrize("profile", ["private", "guarded"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_is_as_measured(
    kind: Kind, profile: str, shape: Callable[[], PretrainedConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, ratios, found = resolve(profile), [], list[Advice]()
    question = Question(shape.__name__, shape(), kind, *SIZES[kind], resolved, torch.float32, 1)
    with ExitStack() as stack:
        linked = [stack.enter_context(linked_worker(UNIX, 1)) for _ in range(2 if resolved.masks else 1)]
        client, mask_client = linked[0][0], linked[1][0] if resolved.masks else None
        patched, clock = stack.enter_context(monkeypatch.context()), processor_seconds(*(it[1].pid for it in linked))
        patched.setattr(time, "perf_counter", clock)
        model = protect(
            random_model(shape()), client, profile, base="closed", mask_worker=mask_client,
            masking=Masking(memory_bytes=0),
        )  # fmt: skip
        plain, ours = (WORKLOADS[kind](one, *SIZES[kind]) for one in (random_model(shape()), model))
        for number in range(ROUNDS):
            if number % BETWEEN == 0:
                seconds_of(plain), seconds_of(ours)
                found.append(advise(question, {"worker": client}, mask_client, silent))
            ratios.append(1 / (seconds_of(plain) / seconds_of(ours)))
    predicted = statistics.median(it.workers[0].prediction.ratio for it in found)
    measured = statistics.median(ratios)
    print(
        f"{shape.__name__} {kind} {profile}: {predicted:.2f}, measured {measured:.2f}: {predicted / measured - 1:+.0%}"
    )
    assert predicted == pytest.approx(measured, rel=OFF_BY)


def test_what_several_workers_do_is_as_measured() -> None:
    """Of workers of a known speed, which are the limit."""
    bench = FleetBench(workers=(3,), rate=1.0, width=768, length=64, rounds=2)
    question = Question("", bench.config(), "forward", 1, 64, resolve("private", first_blocks=0), torch.float32, 1)
    with throttled_workers(3, bench.rate) as addresses, ExitStack() as stack:
        links = {address: stack.enter_context(open_link(address)) for address in addresses}
        team = dict(advise(question, links, None, silent).teams())[3]
    measured = {row.placement: 1 / row.throughput for row in bench.run(silent).rows}
    print(f"shards {team.sharded_seconds:.3f} s, measured {measured['shards']:.3f}")
    print(f"streams {team.streamed_seconds:.3f} s, measured {measured['replicas']:.3f}")
    assert team.sharded_seconds == pytest.approx(measured["shards"], rel=OFF_BY)
    assert team.streamed_seconds == pytest.approx(measured["replicas"], rel=OFF_BY)
