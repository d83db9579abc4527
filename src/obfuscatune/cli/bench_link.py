"""`obfuscatune bench wire`."""

from pathlib import Path
from typing import Annotated

import typer

from obfuscatune.cli import options
from obfuscatune.cli.bench_files import keep, result_name
from obfuscatune.cli.options import option
from obfuscatune.cli.output import notice, write_json, write_text
from obfuscatune.machine import cores
from obfuscatune.wire.errors import ConfigError


def wire(
    rows: Annotated[list[int] | None, option("--rows", "In a message; may be repeated.", default="1 to 16384")] = None,
    width: Annotated[int, typer.Option(help="float32 numbers in a row.", min=1, max=4096)] = 256,
    link: Annotated[
        list[str] | None,
        option("--link", "shared memory, unix socket, tcp or tls; may be repeated.", default="all of them"),
    ] = None,
    threads: Annotated[int | None, option("--threads", "Of both processes.", default="all cores")] = None,
    out: Annotated[Path | None, option("--out", "Also write JSON, Markdown and a picture to this folder.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Time rows on their way to a worker on this machine and back, by each kind of link.

    What the worker takes to multiply them is on its own clock and taken off. A line is fitted to each link: its latency
    and its bandwidth, which `bench predict` reckons with.
    """
    from obfuscatune.bench.wire import LINKS, ROWS, WireBench

    links, counts = tuple(link or LINKS), tuple(sorted(set(rows or ROWS)))
    if unknown := [name for name in links if name not in LINKS]:
        raise ConfigError(f"--link {unknown[0]!r} is none of {', '.join(LINKS)}")
    if counts[0] < 1 or len(counts) < 2:
        raise ConfigError("--rows is at least 1, and takes two or more numbers: a line is fitted to them")
    measured = WireBench(links, counts, width, threads or cores()).run(notice)
    if out is not None:
        from obfuscatune.bench.plots import plot_wire

        path = keep(out, result_name("wire"), measured.as_json(), measured.as_markdown(), plot_wire(measured))
        notice(f"written: {path}")
    if as_json:
        write_json(measured.as_json())
    else:
        write_text(measured.as_markdown())
