"""`obfuscatune bench step`, `forward` and `decode`: protected work beside plain work, timed in turn on this machine."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

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
from obfuscatune.cli.output import notice
from obfuscatune.machine import cores
from obfuscatune.option import Option

Work = Literal["step", "forward", "decode"]
_LINK = "The link to the worker"


@dataclass(frozen=True)
class Sizes:
    """The options of `bench step` and `bench forward`."""

    shape: Shape = "gpt2"
    layers: Layers = None
    batch: Batch = 2
    length: Length = 256
    threads: Threads = None
    rounds: Rounds = 7
    profiles: Profiles = None
    masks_ahead: Annotated[
        bool, Option("Draw the masks of guarded before each round: what that takes is not counted.")
    ] = False
    link: Annotated[
        str,
        Option(
            "unix, with shared memory; tcp; or tls, with certificates that are made for it.",
            _LINK,
            choices=("unix", "tcp", "tls"),
        ),
    ] = "unix"
    delay_ms: Annotated[
        float | None,
        Option("Added to each round trip, by a network of its own between two namespaces (needs root).", _LINK),
    ] = None
    gbit: Annotated[float | None, Option("10⁹ bits a second each way, by the same network.", _LINK)] = None


@dataclass(frozen=True)
class DecodingSizes(Sizes):
    """The options of `bench decode`: other defaults for batch and length."""

    batch: Annotated[int, Option("Sequences that are decoded together.", least=1)] = 1
    length: Annotated[int, Option("Tokens of the prompt, which is not timed.", least=2)] = 32


@command(
    "obfuscatune bench step --shape gpt2 --profile private,paper,guarded --out benchmarks/results",
    "obfuscatune bench step --shape gpt2 --link tls --delay-ms 0.5 --gbit 10",
)
def step(sizes: Sizes, ending: Ending) -> None:
    """Time a LoRA step (forward, backward, AdamW) protected and plain.

    Each side has its own process and they take turns, so none disturbs another. Plain runs at its own best setting of
    OpenMP's waiting, which is tried first. Weights are random: time does not depend on them. Beside the times stands
    where they go, what the processes hold in memory, and the least that this machine could need for the same products.
    """
    _side_by_side("step", sizes, ending)


@command("obfuscatune bench forward --shape gpt2 --batch 2 --length 256")
def forward(sizes: Sizes, ending: Ending) -> None:
    """Time a forward pass without gradients, protected and plain, as `bench step` does."""
    _side_by_side("forward", sizes, ending)


@command(
    "obfuscatune bench decode --shape gpt2 --batch 8",
    "obfuscatune bench decode --shape gpt2 --batch 8 --link tcp --delay-ms 1",
)
def decode(sizes: DecodingSizes, ending: Ending) -> None:
    """Time the decoding of 16 tokens a stream with a cache, protected and plain, as `bench step` does."""
    _side_by_side("decode", sizes, ending)


def _side_by_side(work: Work, sizes: Sizes, ending: Ending) -> None:
    from obfuscatune.bench.link import LinkSettings
    from obfuscatune.bench.step import StepBench
    from obfuscatune.bench.workload import config_of, shape_name

    config_of(sizes.shape, sizes.layers)  # a wrong name fails here, not in a child process
    profiles = checked_profiles(sizes.profiles)
    link = LinkSettings(sizes.link, sizes.delay_ms, sizes.gbit)
    link.check()
    settings = asdict(sizes) | {"threads": sizes.threads or cores(), "profiles": profiles, "link": link}
    del settings["delay_ms"], settings["gbit"]
    measured = StepBench(work=work, **settings).run(notice)
    streams = (f"{sizes.batch}-streams",) if work == "decode" else ()
    linked = () if link == LinkSettings() else (str(link),)
    name = result_name(work, shape_name(sizes.shape), sizes.layers, *streams, *profiles, *linked)

    ending.show(measured, name, measured.picture())
