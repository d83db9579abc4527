"""`obfuscatune bench`: protected and plain, timed in turn on this machine."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from obfuscatune.cli import options
from obfuscatune.cli.bench_files import keep, result_name
from obfuscatune.cli.bench_kept import check
from obfuscatune.cli.bench_link import wire
from obfuscatune.cli.bench_memory import memory
from obfuscatune.cli.bench_predict import predict
from obfuscatune.cli.options import option
from obfuscatune.cli.output import notice, write_json, write_text
from obfuscatune.machine import cores
from obfuscatune.wire.errors import ConfigError

bench = typer.Typer(
    name="bench",
    help="Time protected work beside plain work on this machine.",
    no_args_is_help=True,
    add_completion=False,
)


@bench.callback()
def _group() -> None:
    """Time protected work beside plain work on this machine."""


Shape = Annotated[str, typer.Option(help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, … or a config.json.")]
Layers = Annotated[int | None, option("--layers", "Fewer blocks than the shape has.", default="all")]
Batch = Annotated[int, typer.Option(help="Sequences at a time.", min=1)]
Length = Annotated[int, typer.Option(help="Tokens a sequence.", min=2)]
Threads = Annotated[int | None, option("--threads", "For every process.", default="all cores")]
Rounds = Annotated[int, typer.Option(help="Counted rounds of each side.", min=1)]
Profiles = Annotated[
    str | None, option("--profile", "Profiles to time beside plain, as private,paper,guarded.", default="private")
]
Out = Annotated[Path | None, option("--out", "Also write JSON, Markdown and a picture to this folder.")]


@bench.command(
    epilog="Example: obfuscatune bench step --shape gpt2 --profile private,paper,guarded --out benchmarks/results"
)
def step(
    shape: Shape = "gpt2",
    layers: Layers = None,
    batch: Batch = 2,
    length: Length = 256,
    threads: Threads = None,
    rounds: Rounds = 7,
    profile: Profiles = None,
    out: Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Time a LoRA step (forward, backward, AdamW) protected and plain.

    Each side has its own process and they take turns, so none disturbs another. Plain runs at its own best setting of
    OpenMP's waiting, which is tried first. Weights are random: time does not depend on them. Beside the times stands
    where they go, what the processes hold in memory, and the least that this machine could need for the same products.
    """
    _side_by_side("step", shape, layers, batch, length, threads, rounds, profile, out, as_json=as_json)


@bench.command(epilog="Example: obfuscatune bench forward --shape gpt2 --batch 2 --length 256")
def forward(
    shape: Shape = "gpt2",
    layers: Layers = None,
    batch: Batch = 2,
    length: Length = 256,
    threads: Threads = None,
    rounds: Rounds = 7,
    profile: Profiles = None,
    out: Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Time a forward pass without gradients, protected and plain, as `bench step` does."""
    _side_by_side("forward", shape, layers, batch, length, threads, rounds, profile, out, as_json=as_json)


@bench.command(epilog="Example: obfuscatune bench decode --shape gpt2 --batch 8")
def decode(
    shape: Shape = "gpt2",
    layers: Layers = None,
    batch: Annotated[int, typer.Option(help="Streams that are decoded together.", min=1)] = 1,
    length: Annotated[int, typer.Option(help="Tokens of the prompt, which is not timed.", min=2)] = 32,
    threads: Threads = None,
    rounds: Rounds = 7,
    profile: Profiles = None,
    out: Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Time the decoding of 16 tokens a stream with a cache, protected and plain, as `bench step` does."""
    _side_by_side("decode", shape, layers, batch, length, threads, rounds, profile, out, as_json=as_json)


def _side_by_side(
    work: Literal["step", "forward", "decode"],
    shape: str,
    layers: int | None,
    batch: int,
    length: int,
    threads: int | None,
    rounds: int,
    profile: str | None,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Measure, show and keep."""
    from obfuscatune.bench.shapes import config_of, shape_name
    from obfuscatune.bench.step import StepBench
    from obfuscatune.enclave.profiles import resolve

    config_of(shape, layers)  # a wrong name fails here, not in a child process
    profiles = tuple(dict.fromkeys((profile or "private").split(",")))
    for one in profiles:
        resolve(one)
    measured = StepBench(
        work=work,
        shape=shape,
        layers=layers,
        batch=batch,
        length=length,
        threads=threads or cores(),
        rounds=rounds,
        profiles=profiles,
    ).run(notice)
    if out is not None:
        from obfuscatune.bench.plots import plot_step

        size = (f"{batch}-streams",) if work == "decode" else ()
        name = result_name(work, shape_name(shape), layers, *size, *profiles)
        notice(f"written: {keep(out, name, measured.as_json(), measured.as_markdown(), plot_step(measured))}")
    if as_json:
        write_json(measured.as_json())
    else:
        write_text(measured.as_markdown())


@bench.command(
    epilog="Example: obfuscatune bench obfuscate --shape gpt2-xl --out benchmarks/results\n\n"
    "Dense: obfuscatune bench obfuscate --shape gpt2 --transform structured --transform haar"
)
def obfuscate(
    shape: Annotated[str, typer.Option(help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, … or a config.json.")] = "gpt2-xl",
    layers: Annotated[int | None, option("--layers", "Fewer blocks than the shape has.", default="all")] = None,
    model: Annotated[Path | None, option("--model", "A model directory instead of a shape.")] = None,
    transform: Annotated[
        list[str] | None, option("--transform", "structured, haar, …; may be repeated.", default="structured")
    ] = None,
    threads: Annotated[int | None, option("--threads", "For every process.", default="all cores")] = None,
    rounds: Annotated[int, typer.Option(help="Loads with each transform; the fastest counts.", min=1)] = 3,
    profile: options.Profile = None,
    first_blocks: options.FirstBlocks = None,
    memory_kept: Annotated[
        bool,
        typer.Option(
            "--memory-kept",
            help="Without what a virtual machine's host takes to supply new memory: "
            "a process beside it holds some, and gives it back as the worker takes it.",
        ),
    ] = False,
    out: Annotated[Path | None, option("--out", "Also write JSON and Markdown to this folder.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Time a model's way from its files to under protection, and weigh the processes.

    A shape is written to disk first, with random weights, as Hugging Face lays models out, and removed in the end.
    Then a fresh process loads it beside a worker process, for each transform. haar keeps dense matrices in the
    enclave: at gpt2-xl, some 40 GB of them with the default profile; ask for fewer --layers, or --profile paper.
    """
    from obfuscatune.bench.obfuscate import ObfuscateBench
    from obfuscatune.bench.shapes import config_of, shape_name
    from obfuscatune.enclave.profiles import resolve

    transforms = tuple(transform or ["structured"])
    for one in transforms:
        resolve(profile or "private", transform=one, **({} if first_blocks is None else {"first_blocks": first_blocks}))
    config_of(shape, layers)
    measured = ObfuscateBench(
        shape=shape,
        layers=layers,
        model=model,
        transforms=transforms,
        profile=profile or "private",
        first_blocks=first_blocks,
        threads=threads or cores(),
        rounds=rounds,
        memory_kept=memory_kept,
    ).run(notice)
    if out is not None:
        parts = (profile or "private", *transforms, *(["memory-kept"] if memory_kept else []))
        name = result_name("obfuscate", shape_name(shape) if model is None else model.name, layers, *parts)
        notice(f"written: {keep(out, name, measured.as_json(), measured.as_markdown())}")
    if as_json:
        write_json(measured.as_json())
    else:
        write_text(measured.as_markdown())


@bench.command(epilog="Example: obfuscatune bench verify --out benchmarks/results")
def verify(
    honest_calls: Annotated[int, typer.Option("--honest-calls", help="In each dtype.", min=1)] = 100_000,
    trials: Annotated[int, typer.Option(help="Of each kind and size of tampering.", min=1)] = 1_000,
    requests: Annotated[int, typer.Option(help="Timed over each link, as the worker sees them.", min=10)] = 1_000,
    out: Annotated[Path | None, option("--out", "Also write JSON and Markdown to this folder.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Count how often a worker's wrong product is caught, and how near an honest one comes to a false alarm.

    And whether the time before a request tells a worker that its product will be checked: an AUC of 0.5 says no.
    """
    from obfuscatune.bench.verify import VerifyBench

    measured = VerifyBench(honest_calls, trials, requests).run(notice)
    if out is not None:
        notice(f"written: {keep(out, result_name('verify'), measured.as_json(), measured.as_markdown())}")
    if as_json:
        write_json(measured.as_json())
    else:
        write_text(measured.as_markdown())


@bench.command(epilog="Example: obfuscatune bench rotation --dim 768 --dim 3072 --rows 1 --rows 512")
def rotation(
    dim: Annotated[list[int] | None, option("--dim", "Width of x; may be repeated.", default="GPT-2's")] = None,
    rows: Annotated[list[int] | None, option("--rows", "Of x; may be repeated.", default="1, 8, 32, 512, 4096")] = None,
    threads: Annotated[int | None, option("--threads", "Of torch and of the kernels.", default="all cores")] = None,
    out: Annotated[Path | None, option("--out", "Also write JSON and Markdown to this folder.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Time rotation and mixing, by torch's operations and by the compiled kernels, beside the machine's own limits."""
    from obfuscatune.bench.rotation import DIMS, ROWS, RotationBench
    from obfuscatune.enclave.transforms.structured import DENSE_BELOW

    dims, counts = tuple(dim or DIMS), tuple(rows or ROWS)
    if min(dims) <= DENSE_BELOW or min(counts) < 1:
        raise ConfigError(f"--dim is more than {DENSE_BELOW}: below, transforms are dense; --rows is at least 1")
    measured = RotationBench(dims, counts, threads or cores()).run(notice)
    if out is not None:
        notice(f"written: {keep(out, result_name('rotation'), measured.as_json(), measured.as_markdown())}")
    if as_json:
        write_json(measured.as_json())
    else:
        write_text(measured.as_markdown())


bench.command(epilog="Example: obfuscatune bench wire --link tcp --link tls --out benchmarks/results")(wire)
bench.command(
    epilog="Example: obfuscatune bench check new/2026-01-31-step-gpt2-private.json --kept benchmarks/results"
)(check)
bench.command(
    epilog="Example: obfuscatune bench memory --steps 1000 --profile private,guarded --out benchmarks/results"
)(memory)
bench.command(
    epilog="Example: obfuscatune bench predict --from benchmarks/results/2026-01-31-step-gpt2-private.json --shape "
    "gpt2-xl --worker-gflops 20000 --link-gbytes 1.2 --latency-us 100"
)(predict)
