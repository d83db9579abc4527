"""`obfuscatune bench`: protected and plain, timed in turn on this machine."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from obfuscatune.cli import options
from obfuscatune.cli.options import option
from obfuscatune.cli.output import notice, write_json, write_text
from obfuscatune.report.units import format_bytes
from obfuscatune.wire.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from obfuscatune.bench.obfuscate import ObfuscateResult
    from obfuscatune.bench.step import StepResult

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
Out = Annotated[Path | None, option("--out", "Also write the figures to a JSON file in this folder.")]


@bench.command(epilog="Example: obfuscatune bench step --shape gpt2 --rounds 9 --out benchmarks/results")
def step(
    shape: Shape = "gpt2",
    layers: Layers = None,
    batch: Batch = 2,
    length: Length = 256,
    threads: Threads = None,
    rounds: Rounds = 7,
    profile: options.Profile = None,
    out: Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Time a LoRA step (forward, backward, AdamW) protected and plain.

    Each side has its own process and they take turns, so neither disturbs the other. Plain runs at its own best
    setting of OpenMP's waiting, which is tried first. Weights are random: time does not depend on them.
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
    profile: options.Profile = None,
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
    profile: options.Profile = None,
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
    from obfuscatune.bench.shapes import config_of
    from obfuscatune.bench.step import StepBench
    from obfuscatune.enclave.profiles import resolve

    config_of(shape, layers)  # a wrong name fails here, not in a child process
    resolve(profile or "private")
    measured = StepBench(
        work=work,
        shape=shape,
        layers=layers,
        batch=batch,
        length=length,
        threads=threads or os.cpu_count() or 1,
        rounds=rounds,
        profile=profile or "private",
    ).run(notice)
    if out is not None:
        notice(f"written: {_write(measured, out)}")
    if as_json:
        write_json(measured.as_json())
    else:
        _print(measured)


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
    out: Annotated[Path | None, option("--out", "Also write JSON and Markdown to this folder.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Time a model's way from its files to under protection, and weigh the processes.

    A shape is written to disk first, with random weights, as Hugging Face lays models out, and removed in the end.
    Then a fresh process loads it beside a worker process, for each transform. haar keeps dense matrices in the
    enclave: at gpt2-xl, some 40 GB of them with the default profile; ask for fewer --layers, or --profile paper.
    """
    from obfuscatune.bench.obfuscate import ObfuscateBench
    from obfuscatune.bench.shapes import config_of
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
        threads=threads or os.cpu_count() or 1,
        rounds=rounds,
    ).run(notice)
    if out is not None:
        notice(f"written: {_write_obfuscate(measured, out)}")
    if as_json:
        write_json(measured.as_json())
    else:
        write_text(measured.as_markdown())


@bench.command(epilog="Example: obfuscatune bench verify --out benchmarks/results")
def verify(
    honest_calls: Annotated[int, typer.Option("--honest-calls", help="In each dtype.", min=1)] = 100_000,
    trials: Annotated[int, typer.Option(help="Of each kind and size of tampering.", min=1)] = 1_000,
    out: Annotated[Path | None, option("--out", "Also write JSON and Markdown to this folder.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Count how often a worker's wrong product is caught, and how near an honest one comes to a false alarm."""
    from obfuscatune.bench.verify import VerifyBench

    measured = VerifyBench(honest_calls, trials).run(notice)
    if out is not None:
        name = f"{datetime.now(UTC).strftime('%Y-%m-%d')}-verify"
        _keep(out, f"{name}.md", measured.as_markdown())
        notice(f"written: {_keep(out, f'{name}.json', measured.as_json())}")
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
    measured = RotationBench(dims, counts, threads or os.cpu_count() or 1).run(notice)
    if out is not None:
        name = f"{datetime.now(UTC).strftime('%Y-%m-%d')}-rotation"
        _keep(out, f"{name}.md", measured.as_markdown())
        notice(f"written: {_keep(out, f'{name}.json', measured.as_json())}")
    if as_json:
        write_json(measured.as_json())
    else:
        write_text(measured.as_markdown())


def _print(measured: "StepResult") -> None:
    b, plain = measured.bench, measured.plain_seconds
    depth = "all" if b.layers is None else str(b.layers)
    what = {"step": "LoRA step", "forward": "forward pass", "decode": "16 tokens a stream"}[b.work]
    write_text(f"{what}, {b.shape} ({depth} layers), batch {b.batch} x {b.length}, {b.threads} threads, float32")
    write_text(f"  plain      {plain:7.3f} s   median of {b.rounds}; OpenMP waiting: {measured.plain_waiting}")
    write_text(
        f"  protected  {measured.protected_seconds:7.3f} s   profile {b.profile}; "
        f"{measured.protected[0]['crossings']} crossings, {format_bytes(measured.protected[0]['bytes'])} a step"
    )
    spread = f"{min(measured.ratios):.2f} to {max(measured.ratios):.2f}"
    write_text(f"  ratio      {measured.ratio:7.2f}     round by round {spread}")
    write_text(f"  largest difference of a result: {measured.difference:.1e}")
    write_text("  where the protected side's time goes:")
    for name, seconds in sorted(measured.breakdown.items(), key=lambda item: -item[1]):
        write_text(f"    {seconds:7.3f} s  {seconds / measured.protected_seconds:5.1%}  {name}")


def _write(measured: "StepResult", folder: Path) -> Path:
    b = measured.bench
    streams = (f"{b.batch}-streams",) if b.work == "decode" else ()
    return _keep(folder, _name(b.work, b.shape, b.layers, *streams, b.profile) + ".json", measured.as_json())


def _write_obfuscate(measured: "ObfuscateResult", folder: Path) -> Path:
    b = measured.bench
    name = _name("obfuscate", b.shape if b.model is None else b.model.name, b.layers, b.profile, *b.transforms)
    _keep(folder, f"{name}.md", measured.as_markdown())
    return _keep(folder, f"{name}.json", measured.as_json())


def _name(what: str, shape: str, layers: int | None, *parts: str) -> str:
    """`2026-01-31-step-gpt2-4-layers-private`."""
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    depth = [] if layers is None else [f"{layers}-layers"]
    return "-".join([day, what, Path(shape).stem, *depth, *parts])


def _keep(folder: Path, name: str, content: dict[str, Any] | str) -> Path:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    return path
