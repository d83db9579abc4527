"""`obfuscatune bench fleet`."""

from typing import Annotated

from obfuscatune.cli.bench_group import Ending, command, result_name
from obfuscatune.cli.output import notice
from obfuscatune.errors import ConfigError
from obfuscatune.option import Option

_PLACEMENTS = ("shards", "replicas")


@command("obfuscatune bench fleet --workers 1,2,4,8,16 --rate 0.2 --out benchmarks/results")
def fleet(
    workers: Annotated[str, Option("Numbers of workers, as 1,2,4.")] = "1,2,4,8,16",
    rate: Annotated[float, Option("10⁹ operations a second of each worker.")] = 0.2,
    placement: Annotated[str | None, Option("shards or replicas.", unset="both", choices=_PLACEMENTS)] = None,
    width: Annotated[int, Option("Of the model.", least=64)] = 1024,
    layers: Annotated[int, Option("Its blocks.", least=1)] = 1,
    batch: Annotated[int, Option("Sequences of a pass.", least=1)] = 1,
    length: Annotated[int, Option("Tokens a sequence.", least=2)] = 64,
    rounds: Annotated[int, Option("Passes of each stream.", least=1)] = 1,
    *,
    ending: Ending,
) -> None:
    """Measure how throughput grows with the number of workers, each throttled to a known rate.

    A throttled worker computes real products and then waits until their time is over, so many of them fit on one
    machine. Shards: all workers share each product of one stream. Replicas: each product of many streams goes to one of
    them. Beside it stands the enclave's own part, which is the limit.
    """
    from obfuscatune.bench.fleet import FleetBench

    try:
        counts = tuple(sorted({int(it) for it in workers.split(",")}))
    except ValueError as error:
        raise ConfigError(f"--workers: expected numbers, as 1,2,4, found {workers}") from error
    if not counts or counts[0] < 1 or counts[-1] > 256:
        raise ConfigError("--workers: expected 1 to 256")
    if not rate > 0:
        raise ConfigError(f"--rate: expected more than 0, found {rate:g}")
    if placement not in (None, *_PLACEMENTS):
        raise ConfigError(f"--placement: expected shards or replicas, found {placement}")
    placements = _PLACEMENTS if placement is None else (placement,)
    bench = FleetBench(counts, rate, width, layers, batch, length, rounds, placements)
    ending.show(bench.run(notice), result_name("fleet"))
