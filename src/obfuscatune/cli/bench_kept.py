"""`obfuscatune bench check`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from obfuscatune.cli import options
from obfuscatune.cli.output import write_json, write_text

KEPT = Path("benchmarks/results")
WORSE = 1
"""Exit code."""


def check(
    result: Annotated[Path, typer.Argument(help="JSON file that bench step, forward or decode wrote.")],
    kept: Annotated[Path, typer.Option(help="Folder with the results that were kept.")] = KEPT,
    margin: Annotated[float, typer.Option(help="By what share of itself a ratio may grow.", min=0.0)] = 0.05,
    as_json: options.AsJson = False,
) -> None:
    """Compare a result with the last one kept of the same work on the same kind of machine.

    Every profile's ratio of protected to plain beside the kept one. Ends with code 1 if one has grown by more than the
    margin, which is for noise.
    """
    from obfuscatune.bench.compare import as_markdown, compare, read_result

    comparisons = compare(read_result(result), kept, but=result)
    if as_json:
        write_json([asdict(one) | {"change": one.change, "verdict": one.verdict(margin)} for one in comparisons])
    else:
        write_text(as_markdown(comparisons, margin))
    if any(one.is_worse(margin) for one in comparisons):
        raise typer.Exit(WORSE)
