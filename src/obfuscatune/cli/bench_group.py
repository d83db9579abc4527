"""What the commands of `obfuscatune bench` share: their group, options, and what becomes of their results."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from obfuscatune.cli import options
from obfuscatune.cli.groups import command_group, command_of
from obfuscatune.cli.output import notice, write_result
from obfuscatune.option import Option

if TYPE_CHECKING:
    from obfuscatune.report.charts import Bars, Chart

bench = command_group("bench", "Time protected work beside plain work on this machine.")
command = partial(command_of, bench)
"""Registers a command of `bench`, with the examples below its help."""

Shape = Annotated[str, Option("gpt2, gpt2-medium, gpt2-large, gpt2-xl, … or a config.json.")]
Layers = Annotated[int | None, Option("Fewer blocks than the shape has.", unset="all")]
Batch = Annotated[int, Option("Sequences at a time.", least=1)]
Length = Annotated[int, Option("Tokens a sequence.", least=2)]
Threads = Annotated[int | None, Option("For every process.", unset="all cores")]
Rounds = Annotated[int, Option("Counted rounds of each side.", least=1)]
Profiles = Annotated[
    str | None, Option("Profiles to time beside plain, as private,paper,guarded.", unset="private", name="profile")
]


@dataclass(frozen=True)
class Ending:
    """What becomes of a result."""

    out: Annotated[
        Path | None, Option("Also write JSON, Markdown, an HTML page and a picture, if there is one, to this folder.")
    ] = None
    as_json: options.AsJson = False

    def show(self, result: "Result", name: str, picture: "Bars | Chart | None" = None) -> None:
        """Write the files, if a folder was named, and print the result."""
        from obfuscatune.bench.compare import keep

        if self.out is not None:
            notice(f"written: {keep(self.out, name, result.as_json(), result.as_markdown(), picture)}")
        write_result(result.as_json(), result.as_markdown(), as_json=self.as_json)


class Result(Protocol):
    """What a benchmark measured."""

    def as_json(self) -> dict[str, Any]:
        """Everything."""

    def as_markdown(self) -> str:
        """What people read."""


def result_name(what: str, shape: str | None = None, layers: int | None = None, *parts: str) -> str:
    """`2026-01-31-step-gpt2-4-layers-private`; what a file cannot be called, in a path or in knobs, becomes a dash."""
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    named = [] if shape is None else [shape]
    depth = [] if layers is None else [f"{layers}-layers"]
    return re.sub(r"[^\w.()-]+", "-", "-".join([day, what, *named, *depth, *parts]))


def checked_profiles(names: str | None) -> tuple[str, ...]:
    """The names with commas between, each known."""
    from obfuscatune.enclave.profiles import resolve

    profiles = tuple(dict.fromkeys((names or "private").split(",")))
    for name in profiles:
        resolve(name)
    return profiles
