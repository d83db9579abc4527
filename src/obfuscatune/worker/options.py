"""What a worker can be told on the command line; argparse, so that it needs no more than torch."""

import argparse
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, get_args, get_origin, get_type_hints

from obfuscatune.option import Option, split_annotation
from obfuscatune.protocol.limits import MAX_SESSIONS

_COMPUTE, _MEMORY, _TLS = "Computing", "Memory and disk", "Over the network"


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker runs; each field is an option. Checked where each is used."""

    listen: Annotated[str, Option("unix:PATH, or tcp:HOST:PORT (port 0: any free one).")]
    device: Annotated[str, Option("cpu, cuda or cuda:N.", _COMPUTE)] = "cpu"
    dtype: Annotated[
        str, Option("What matrices are kept and multiplied in: as-sent, float32 or bfloat16.", _COMPUTE)
    ] = "as-sent"
    threads: Annotated[int | None, Option("Cores to use.", _COMPUTE, unset="all")] = None
    quota: Annotated[str | None, Option("Memory for matrices, as 8GiB.", _MEMORY, unset="80% of the RAM")] = None
    peer_quota: Annotated[
        str | None,
        Option(
            "What one peer (a TLS key, a user of this host, an address) may have of it.",
            _MEMORY,
            unset="all; by TLS and with --when-full refuse, its part of --quota",
        ),
    ] = None
    when_full: Annotated[
        str,
        Option(
            "refuse what does not fit, or evict what was not used for longest, of peers with more than their share.",
            _MEMORY,
        ),
    ] = "refuse"
    store: Annotated[
        Path | None, Option("Keep matrices here as well, so that a later run need not upload them.", _MEMORY)
    ] = None
    store_quota: Annotated[
        str | None,
        Option(
            "Disk for that, as 8GiB; what was not used for longest is removed.", _MEMORY, unset="as much as --quota"
        ),
    ] = None
    serve_model: Annotated[
        list[Path] | None,
        Option(
            "A directory of published safetensors whose weights enclaves with --public-base need not send; may repeat.",
            _MEMORY,
        ),
    ] = None
    record: Annotated[Path | None, Option("Write down here all that this worker sees, to be examined.", _MEMORY)] = None
    max_sessions: Annotated[int, Option("The most enclaves at a time.", _MEMORY)] = MAX_SESSIONS
    tls_cert: Annotated[Path | None, Option("This worker's certificate (obfuscatune keygen).", _TLS)] = None
    tls_key: Annotated[Path | None, Option("Its private key.", _TLS)] = None
    peer: Annotated[Path | None, Option("The certificates of the enclaves that may connect, one file.", _TLS)] = None
    unsafe_plain_tcp: Annotated[
        bool, Option("Leave this machine without TLS; anyone on the way can interfere.", _TLS)
    ] = False
    json: Annotated[bool, Option("Say that it is ready as one line of JSON.")] = False
    until_stdin_closes: bool = False
    """Stop when the program that started it ends; for programs, and no option of `obfuscatune worker`."""


def parse_arguments(arguments: list[str]) -> WorkerOptions:
    """Options from `python -m obfuscatune.worker` arguments; exits with usage on a bad one, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m obfuscatune.worker",
        description="The untrusted worker: holds matrices it knows nothing about, and multiplies by them.",
    )
    hints = get_type_hints(WorkerOptions, include_extras=True)
    for field in fields(WorkerOptions):
        kind, option = split_annotation(hints[field.name])
        flag = f"--{field.name.replace('_', '-')}"
        if option is None:
            parser.add_argument(flag, action="store_true", help="for programs: stop when their pipe closes")
            continue
        told = option.unset or (field.default if isinstance(field.default, str | int) else None)
        text = (option.help if told in (None, False) else f"{option.help} [default: {told}]").replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif field.default is MISSING:
            parser.add_argument(flag, required=True, help=text)
        else:
            read = next(it for it in (*get_args(kind), kind) if it is not NoneType)
            if get_origin(read) is list:
                parser.add_argument(flag, type=get_args(read)[0], action="append", help=text)
            else:
                parser.add_argument(flag, type=read, default=field.default, help=text)
    return WorkerOptions(**vars(parser.parse_args(arguments)))
