"""What a worker can be told on the command line; argparse, so that it needs no more than torch."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.wire.errors import ConfigError
from obfuscatune.wire.limits import GIB, KIB, MAX_SESSIONS, MIB

UNITS = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB, "": 1}


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker runs. Checked where each is used."""

    listen: str
    device: str = "cpu"
    dtype: str = "as-sent"
    quota: str | None = None
    peer_quota: str | None = None
    when_full: str = "refuse"
    threads: int | None = None
    max_sessions: int = MAX_SESSIONS
    record: Path | None = None
    store: Path | None = None
    store_quota: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    peer: Path | None = None
    unsafe_plain_tcp: bool = False
    until_stdin_closes: bool = False
    json: bool = False


def parse_size(text: str) -> int:
    """Bytes from "8GiB", "512 MiB" or "1000000".

    Raises:
        ConfigError: anything else.
    """
    digits = text.rstrip("KMGTiB ")
    unit = text[len(digits) :].strip()
    if not digits.isascii() or not digits.isdigit() or unit not in UNITS:
        raise ConfigError(f"{text!r} is no size: write bytes, or a number with KiB, MiB, GiB or TiB, as 8GiB")
    return int(digits) * UNITS[unit]


def parse_arguments(arguments: list[str]) -> WorkerOptions:
    """Options from `python -m obfuscatune.worker` arguments; exits with usage on a bad one, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m obfuscatune.worker",
        description="The untrusted worker: holds matrices it knows nothing about, and multiplies by them.",
    )
    parser.add_argument("--listen", required=True, help="unix:/path/to/worker.sock or tcp:host:port")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="as-sent", choices=["as-sent", "float32", "bfloat16"])
    parser.add_argument("--quota", help="memory for matrices, as 8GiB; default 80%% of the RAM or of the container's")
    parser.add_argument("--peer-quota", help="what one peer may have of it; default all, by TLS its part of --quota")
    parser.add_argument("--when-full", default="refuse", choices=["refuse", "evict"])
    parser.add_argument("--threads", type=int, help="cores to compute on; default all")
    parser.add_argument("--max-sessions", type=int, default=MAX_SESSIONS, help="enclaves at a time")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write down all that this worker sees")
    parser.add_argument("--store", type=Path, metavar="DIR", help="keep matrices on disk, by their content")
    parser.add_argument("--store-quota", help="how much of that disk, as 8GiB; default as much as --quota")
    parser.add_argument("--tls-cert", type=Path, metavar="PEM")
    parser.add_argument("--tls-key", type=Path, metavar="PEM")
    parser.add_argument("--peer", type=Path, metavar="PEM", help="certificate(s) of the enclaves that may connect")
    parser.add_argument("--unsafe-plain-tcp", action="store_true", help="leave this machine without TLS")
    parser.add_argument("--until-stdin-closes", action="store_true", help="stop when whoever started this ends")
    parser.add_argument("--json", action="store_true", help="say that it is ready as one line of JSON")
    return WorkerOptions(**vars(parser.parse_args(arguments)))
