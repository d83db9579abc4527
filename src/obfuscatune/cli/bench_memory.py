"""`obfuscatune bench memory`."""

from pathlib import Path
from typing import Annotated

import typer

from obfuscatune.cli import options
from obfuscatune.cli.bench_files import keep, result_name
from obfuscatune.cli.options import option
from obfuscatune.cli.output import notice, write_json, write_text
from obfuscatune.machine import cores

GROWS = 1
"""Exit code."""


def memory(
    shape: Annotated[str | None, option("--shape", "gpt2, … or a config.json.", default="the embedded model's")] = None,
    layers: Annotated[int | None, option("--layers", "Fewer blocks than the shape has.", default="all")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.", min=1)] = 2,
    length: Annotated[int, typer.Option(help="Tokens a sequence.", min=2)] = 64,
    threads: Annotated[int | None, option("--threads", "For both processes.", default="all cores")] = None,
    steps: Annotated[int, typer.Option(help="After the warm-up.", min=4)] = 1000,
    warmup: Annotated[int, typer.Option(help="Steps before these.", min=0)] = 100,
    profile: Annotated[
        str | None, option("--profile", "One after the other, as private,guarded.", default="private")
    ] = None,
    out: Annotated[Path | None, option("--out", "Also write JSON, Markdown and a picture to this folder.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Take many protected LoRA steps and watch what enclave and worker hold in memory.

    A line is fitted to the second half of each process's samples: by then both heaps are as large as they need be. Ends
    with code 1 if one rises by more than 4 MiB.
    """
    from obfuscatune.bench.memory import MemoryBench
    from obfuscatune.bench.shapes import config_of
    from obfuscatune.enclave.profiles import resolve

    profiles = tuple(dict.fromkeys((profile or "private").split(",")))
    for one in profiles:
        resolve(one)
    small = {} if shape is None else {"shape": shape}
    bench = MemoryBench(
        **small,
        layers=layers,
        batch=batch,
        length=length,
        threads=threads or cores(),
        steps=steps,
        warmup=warmup,
        profiles=profiles,
    )
    config_of(bench.shape, layers)
    measured = bench.run(notice)
    if out is not None:
        from obfuscatune.bench.plots import plot_memory

        name = result_name("memory", measured.bench["shape"], layers, *profiles)
        notice(f"written: {keep(out, name, measured.as_json(), measured.as_markdown(), plot_memory(measured))}")
    if as_json:
        write_json(measured.as_json())
    else:
        write_text(measured.as_markdown())
    if measured.grows:
        raise typer.Exit(GROWS)
