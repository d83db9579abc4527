"""`obfuscatune bench predict`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from obfuscatune.cli import options
from obfuscatune.cli.options import option
from obfuscatune.cli.output import write_json, write_text

CALIBRATED_ON = "private"
_SPEEDS = "Speeds other than the measured ones"


def predict(
    measured: Annotated[Path, option("--from", "JSON file of bench step or forward: its speeds are taken.")],
    shape: Annotated[str, typer.Option(help="gpt2, …, llama-3.2-1b, llama-3-8b, or a config.json.")] = "gpt2-xl",
    layers: Annotated[int | None, option("--layers", "Fewer blocks than the shape has.", default="all")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.", min=1)] = 2,
    length: Annotated[int, typer.Option(help="Tokens a sequence.", min=2)] = 256,
    profile: options.Profile = None,
    worker_gflops: Annotated[
        float | None, option("--worker-gflops", "10⁹ operations a second of a product.", panel=_SPEEDS)
    ] = None,
    link_gbytes: Annotated[
        float | None, option("--link-gbytes", "10⁹ bytes a second, there and back.", panel=_SPEEDS)
    ] = None,
    latency_us: Annotated[float | None, option("--latency-us", "Of one crossing, in µs.", panel=_SPEEDS)] = None,
    against: Annotated[
        Path | None, option("--against", "Predict what was kept in this folder instead, beside the measured ratios.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Predict the ratio of protected to plain from a model's shape and from speeds (docs/cost-model.md).

    The speeds are those at which a kept result was made; those of a worker on an accelerator or another host are given.
    """
    from obfuscatune.bench.compare import kept_results, read_result
    from obfuscatune.bench.predict import calibrated, check, check_as_markdown
    from obfuscatune.bench.predict import predict as predicted
    from obfuscatune.bench.work import count_work
    from obfuscatune.enclave.profiles import resolve

    document = read_result(measured)
    latency = None if latency_us is None else latency_us * 1e-6
    speeds = calibrated(document, CALIBRATED_ON).elsewhere(worker_gflops, link_gbytes, latency)
    if against is not None:
        rows = list(check(kept_results(against, document), speeds))
        if as_json:
            write_json([asdict(row) | {"error": row.error} for row in rows])
        else:
            write_text(check_as_markdown(rows))
        return
    work = count_work(document["bench"]["work"], shape, layers, batch, length, resolve(profile or CALIBRATED_ON))
    found = predicted(work, speeds)
    if as_json:
        write_json({"work": asdict(work), "speeds": asdict(speeds), **found.as_json()})
    else:
        write_text(found.as_markdown())
