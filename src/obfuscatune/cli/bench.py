"""`obfuscatune bench`: protected work beside plain work, timed in turn on this machine."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer

from obfuscatune.cli import options
from obfuscatune.cli.bench_group import (
    Batch,
    Ending,
    Layers,
    Length,
    Profiles,
    Rounds,
    Shape,
    Threads,
    checked_profiles,
    command,
    result_name,
)
from obfuscatune.cli.bench_group import bench as bench
from obfuscatune.cli.bench_step import Work
from obfuscatune.cli.output import notice, write_result
from obfuscatune.errors import ConfigError
from obfuscatune.machine import cores
from obfuscatune.option import Option, parse_size
from obfuscatune.protocol.addresses import DeviceAddress

KEPT = Path("benchmarks/results")
EXIT_FAILED = 1
"""A ratio or a process has grown."""
_PLACEMENTS = ("shards", "replicas")


@command(
    "obfuscatune bench obfuscate --shape gpt2-xl --out benchmarks/results",
    "obfuscatune bench obfuscate --shape gpt2 --transform structured --transform haar",
    "obfuscatune bench obfuscate --shape llama-3.1-8b --layers 4 --dtype bfloat16 --rounds 1",
)
def obfuscate(
    shape: Shape = "gpt2-xl",
    layers: Layers = None,
    model: Annotated[Path | None, Option("A model directory instead of a shape.")] = None,
    transform: Annotated[list[str] | None, Option("structured, haar, …; may be repeated.", unset="structured")] = None,
    threads: Threads = None,
    rounds: Annotated[int, Option("Loads with each transform; the fastest counts.", least=1)] = 3,
    profile: options.Profile = None,
    first_blocks: options.FirstBlocks = None,
    dtype: options.Dtype = None,
    memory_kept: Annotated[
        bool,
        Option(
            "Without what a virtual machine's host takes to supply new memory: "
            "a process beside it holds some, and gives it back as the worker takes it."
        ),
    ] = False,
    workers: Annotated[int, Option("Of each party; several are a fleet, and share the columns.", least=1)] = 1,
    *,
    ending: Ending,
) -> None:
    """Time a model's way from its files to under protection, and weigh the processes.

    A shape is written to disk first, with random weights, as Hugging Face lays models out, and removed in the end.
    Then a fresh process loads it beside a worker process, for each transform. haar keeps dense matrices in the
    enclave: at gpt2-xl, some 40 GB of them with the default profile; ask for fewer --layers, or --profile paper.
    """
    from obfuscatune.bench.obfuscate import ObfuscateBench
    from obfuscatune.bench.workload import config_of, shape_name
    from obfuscatune.enclave.profiles import resolve

    profile = profile or "private"
    transforms = tuple(transform or ["structured"])
    for one in transforms:
        resolve(profile, transform=one, **({} if first_blocks is None else {"first_blocks": first_blocks}))
    config_of(shape, layers)
    measured = ObfuscateBench(
        shape=shape,
        layers=layers,
        model=model,
        transforms=transforms,
        profile=profile,
        first_blocks=first_blocks,
        dtype=options.check_dtype(dtype),
        threads=threads or cores(),
        rounds=rounds,
        memory_kept=memory_kept,
        workers=workers,
    ).run(notice)
    parts = (profile, *transforms, *(["memory-kept"] if memory_kept else []))
    parts += () if workers == 1 else (f"{workers}-workers",)
    ending.show(measured, result_name("obfuscate", shape_name(shape) if model is None else model.name, layers, *parts))


@command("obfuscatune bench verify --out benchmarks/results")
def verify(
    honest_calls: Annotated[int, Option("In each dtype; under masks a tenth, at each shape.", least=1)] = 100_000,
    trials: Annotated[int, Option("Of each kind and size of tampering.", least=1)] = 1_000,
    requests: Annotated[int, Option("Timed over each link, as the worker sees them.", least=10)] = 1_000,
    *,
    ending: Ending,
) -> None:
    """Count how often a worker's wrong product is caught, and how near an honest one comes to a false alarm.

    Under masks: both workers' products, and how large a change must be to be caught in 50 % and in 99 % of cases.
    And whether the time before a request tells a worker that its product will be checked: an AUC of 0.5 says no.
    """
    from obfuscatune.bench.verify import VerifyBench

    ending.show(VerifyBench(honest_calls, trials, requests).run(notice), result_name("verify"))


@command(
    "obfuscatune bench drift --steps 1000 --out benchmarks/results",
    "obfuscatune bench drift --profile guarded --size 0.13 --json",
)
def drift(
    steps: Annotated[int, Option("LoRA steps of each run.", least=1)] = 20,
    profile: Annotated[
        str | None, Option("One after the other, as private,guarded.", unset="private and guarded")
    ] = None,
    size: Annotated[
        list[float] | None,
        Option(
            "Largest change of a row over the tolerance; may be repeated. From the largest on, until one passes.",
            unset="0.9 to 0.06",
        ),
    ] = None,
    batch: Annotated[int, Option("Examples a step.", least=1)] = 2,
    *,
    ending: Ending,
) -> None:
    """Fine-tune the embedded model with a worker that changes every product by a little less than is found.

    It knows the base model, the transforms and the tolerance, and aims at raising the loss, or at one token. Beside it
    stand an honest worker, and plain in float32; all are compared with plain in float64. A run with 20 steps takes a
    few seconds, with 1,000 some minutes, and there are three aims for each way of changing products.
    `private:verify=0` shows what the changes do that are caught otherwise.
    """
    from obfuscatune.bench.drift import SIZES, DriftBench

    profiles = checked_profiles(profile or "private,guarded")
    bench = DriftBench(steps, profiles, tuple(sorted(size or SIZES, reverse=True)), batch)
    bench.check()

    ending.show(bench.run(notice), result_name("drift", None, None, *profiles))


@command(
    "obfuscatune bench rotation --dim 768 --dim 3072 --rows 1 --rows 512", "obfuscatune bench rotation --device cuda:0"
)
def rotation(
    dim: Annotated[list[int] | None, Option("Width of x; may be repeated.", unset="GPT-2's")] = None,
    rows: Annotated[list[int] | None, Option("Of x; may be repeated.", unset="1, 8, 32, 512, 4096")] = None,
    threads: Annotated[int | None, Option("Of torch and of the kernels.", unset="all cores")] = None,
    device: Annotated[str, Option("Where x lies, as with --enclave-device: cpu, or cuda:N.")] = "cpu",
    *,
    ending: Ending,
) -> None:
    """Time rotation and mixing, by torch's operations and by the compiled kernels, beside the machine's own limits."""
    from obfuscatune.bench.rotation import DIMS, ROWS, RotationBench
    from obfuscatune.enclave.transforms.structured import DENSE_BELOW

    dims, counts = tuple(dim or DIMS), tuple(rows or ROWS)
    if min(dims) <= DENSE_BELOW or min(counts) < 1:
        raise ConfigError(f"--dim is more than {DENSE_BELOW}: below, transforms are dense; --rows is at least 1")
    parts = () if device == "cpu" else (device.replace(":", ""),)
    ending.show(RotationBench(dims, counts, threads or cores(), device).run(notice), result_name("rotation", *parts))


@command("obfuscatune bench wire --link tcp --link tls --out benchmarks/results")
def wire(
    rows: Annotated[list[int] | None, Option("In a message; may be repeated.", unset="1 to 16384")] = None,
    width: Annotated[int, Option("float32 numbers in a row.", least=1, most=4096)] = 256,
    link: Annotated[
        list[str] | None, Option("shared memory, unix socket, tcp or tls; may be repeated.", unset="all of them")
    ] = None,
    threads: Threads = None,
    *,
    ending: Ending,
) -> None:
    """Time rows on their way to a worker on this machine and back, by each kind of link.

    What the worker takes to multiply them is on its own clock and taken off. Beside each, a bare ping-pong of two
    processes that pass as many bytes. A line is fitted to each link: its latency and its bandwidth. Those to workers
    elsewhere are measured by `obfuscatune advise`.
    """
    from obfuscatune.bench.wire import LINKS, ROWS, WireBench

    links, counts = tuple(link or LINKS), tuple(sorted(set(rows or ROWS)))
    if unknown := [name for name in links if name not in LINKS]:
        raise ConfigError(f"--link {unknown[0]!r} is none of {', '.join(LINKS)}")
    if counts[0] < 1 or len(counts) < 2:
        raise ConfigError("--rows is at least 1, and takes two or more numbers: a line is fitted to them")
    measured = WireBench(links, counts, width, threads or cores()).run(notice)

    ending.show(measured, result_name("wire"), measured.picture())


@command("obfuscatune bench seal --size 2GiB --out benchmarks/results")
def seal(
    size: Annotated[str, Option("Of the file that is sealed, as 512MiB or 2GiB.")] = "2GiB",
    rounds: Annotated[int, Option("Of each piece of work; the fastest counts.", least=1)] = 3,
    folder: Annotated[
        Path | None, Option("On the disk that is meant; takes three times the size.", name="dir", unset="TMPDIR")
    ] = None,
    *,
    ending: Ending,
) -> None:
    """Time a bundle's sealing and opening beside AES-GCM alone and beside the disk, and weigh the processes.

    Each piece of work has a process of its own, and they take turns. AES-GCM alone is one thread, over the same file or
    over memory; a bundle is worked on by all cores.
    """
    from obfuscatune.bench.sealing import SealBench

    wanted = parse_size(size)
    if wanted < 1:
        raise ConfigError("--size: expected at least one byte")
    ending.show(SealBench(wanted, rounds, folder).run(notice), result_name("seal", size))


@command("obfuscatune bench check new/2026-01-31-step-gpt2-private.json --kept benchmarks/results")
def check(
    result: Annotated[Path, typer.Argument(help="JSON file that bench step, forward or decode wrote.")],
    kept: Annotated[Path, Option("Folder with the results that were kept.")] = KEPT,
    margin: Annotated[float, Option("By what share of itself a ratio may grow.", least=0)] = 0.05,
    as_json: options.AsJson = False,
) -> None:
    """Compare a result with the last one kept of the same work on the same kind of machine.

    Every profile's ratio of protected to plain beside the kept one. Ends with code 1 if one has grown by more than the
    margin, which is for noise.
    """
    from obfuscatune.bench.compare import as_markdown, compare, read_result

    comparisons = compare(read_result(result), kept, but=result)
    document = [asdict(one) | {"change": one.change, "verdict": one.verdict(margin)} for one in comparisons]
    write_result(document, as_markdown(comparisons, margin), as_json=as_json)
    if any(one.is_worse(margin) for one in comparisons):
        raise typer.Exit(EXIT_FAILED)


@command("obfuscatune bench memory --steps 1000 --profile private,guarded --out benchmarks/results")
def memory(
    shape: Annotated[str | None, Option("gpt2, … or a config.json.", unset="the embedded model's")] = None,
    layers: Layers = None,
    batch: Batch = 2,
    length: Length = 64,
    threads: Threads = None,
    steps: Annotated[int, Option("After the warm-up.", least=4)] = 1000,
    warmup: Annotated[int, Option("Steps before these.", least=0)] = 100,
    profiles: Profiles = None,
    *,
    ending: Ending,
) -> None:
    """Take many protected LoRA steps and watch what enclave and worker hold in memory.

    A line is fitted to the second half of each process's samples: by then both heaps are as large as they need be. Ends
    with code 1 if one rises by more than 4 MiB.
    """
    from obfuscatune.bench.memory import MemoryBench
    from obfuscatune.bench.workload import config_of

    small = {} if shape is None else {"shape": shape}
    bench = MemoryBench(
        **small,
        layers=layers,
        batch=batch,
        length=length,
        threads=threads or cores(),
        steps=steps,
        warmup=warmup,
        profiles=checked_profiles(profiles),
    )
    config_of(bench.shape, layers)
    measured = bench.run(notice)

    ending.show(measured, result_name("memory", measured.bench["shape"], layers, *bench.profiles), measured.picture())
    if measured.grows:
        raise typer.Exit(EXIT_FAILED)


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


@command(
    "obfuscatune bench device --shape gpt2-xl --profile private,guarded --enclave-device cpu,cuda:0 "
    "--dtype float32,bfloat16 --out benchmarks/results",
    "obfuscatune bench device --worker device:cpu --layers 2 --rounds 3",
)
def device(
    worker: Annotated[str, Option("The device: device:cuda:N, or device:cpu.")] = "device:cuda:0",
    enclave_device: Annotated[
        str, Option("Where the enclave's own part lies: cpu, cuda:N, or several with commas between.")
    ] = "cpu",
    dtype: Annotated[str, Option("float32, bfloat16 or float64, or several with commas between.")] = "float32",
    work: Annotated[str, Option("step, forward or decode.", choices=get_args(Work))] = "step",
    shape: Shape = "gpt2",
    layers: Layers = None,
    batch: Batch = 2,
    length: Length = 256,
    rounds: Rounds = 7,
    profiles: Profiles = None,
    *,
    ending: Ending,
) -> None:
    """Time work with a device of this machine as the worker, and plain work on that device, in turn.

    The enclave's own part lies on the CPU or on a GPU. A machine with one GPU can time both: the GPU then plays every
    part, which protects nothing and shows what each takes. Masks are drawn before each round, which is not counted.
    """
    from obfuscatune.bench.device import DeviceBench
    from obfuscatune.bench.workload import config_of, shape_name

    config_of(shape, layers)  # a wrong name fails here
    named = DeviceAddress.parse(worker)
    if work not in get_args(Work):
        raise ConfigError(f"--work: expected one of {', '.join(get_args(Work))}, found {work}")
    places, dtypes = (tuple(dict.fromkeys(said.split(","))) for said in (enclave_device, dtype))
    checked = checked_profiles(profiles)
    measured = DeviceBench(
        named, places, tuple(map(options.check_dtype, dtypes)), checked, work, shape, layers, batch, length, rounds
    ).run(notice)
    name = result_name(f"{named.kind}-{work}", shape_name(shape), layers, *checked, *dtypes)
    ending.show(measured, name)
