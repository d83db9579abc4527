"""`obfuscatune worker`."""

from pathlib import Path
from typing import Annotated

import typer

from obfuscatune.cli.options import option
from obfuscatune.wire.limits import MAX_SESSIONS
from obfuscatune.worker.__main__ import main
from obfuscatune.worker.options import WorkerOptions

_COMPUTE, _MEMORY, _TLS = "Computing", "Memory and disk", "Over the network"


def worker(
    listen: Annotated[str, option("--listen", "unix:PATH, or tcp:HOST:PORT (port 0: any free one).")],
    device: Annotated[str, option("--device", "cpu, cuda or cuda:N.", default="cpu", panel=_COMPUTE)] = "cpu",
    dtype: Annotated[
        str,
        option(
            "--dtype",
            "What matrices are kept and multiplied in: as-sent, float32 or bfloat16.",
            default="as-sent",
            panel=_COMPUTE,
        ),
    ] = "as-sent",
    threads: Annotated[int | None, option("--threads", "Cores to use.", default="all", panel=_COMPUTE)] = None,
    quota: Annotated[
        str | None, option("--quota", "Memory for matrices, as 8GiB.", default="80% of the RAM", panel=_MEMORY)
    ] = None,
    peer_quota: Annotated[
        str | None,
        option(
            "--peer-quota",
            "What one peer (a TLS key, a user of this host, an address) may have of it.",
            default="all; by TLS and with --when-full refuse, its part of --quota",
            panel=_MEMORY,
        ),
    ] = None,
    when_full: Annotated[
        str,
        option(
            "--when-full",
            "refuse what does not fit, or evict what was not used for longest, of peers with more than their share.",
            default="refuse",
            panel=_MEMORY,
        ),
    ] = "refuse",
    store: Annotated[
        Path | None,
        option("--store", "Keep matrices here as well, so that a later run need not upload them.", panel=_MEMORY),
    ] = None,
    store_quota: Annotated[
        str | None,
        option(
            "--store-quota",
            "Disk for that, as 8GiB; what was not used for longest is removed.",
            default="as much as --quota",
            panel=_MEMORY,
        ),
    ] = None,
    record: Annotated[
        Path | None, option("--record", "Write down here all that this worker sees, to be examined.", panel=_MEMORY)
    ] = None,
    max_sessions: Annotated[
        int, option("--max-sessions", "The most enclaves at a time.", default=str(MAX_SESSIONS), panel=_MEMORY)
    ] = MAX_SESSIONS,
    tls_cert: Annotated[
        Path | None, option("--tls-cert", "This worker's certificate (obfuscatune keygen).", panel=_TLS)
    ] = None,
    tls_key: Annotated[Path | None, option("--tls-key", "Its private key.", panel=_TLS)] = None,
    peer: Annotated[
        Path | None, option("--peer", "The certificates of the enclaves that may connect, one file.", panel=_TLS)
    ] = None,
    unsafe_plain_tcp: Annotated[
        bool,
        option("--unsafe-plain-tcp", "Leave this machine without TLS; anyone on the way can interfere.", panel=_TLS),
    ] = False,
    as_json: Annotated[bool, option("--json", "Say that it is ready as one line of JSON.")] = False,
) -> None:
    """Run the untrusted worker, until Ctrl-C: it holds matrices it knows nothing about, and multiplies by them.

    It needs nothing of the enclave: `python -m obfuscatune.worker` takes the same options and does the same.
    """
    options = WorkerOptions(
        listen=listen,
        device=device,
        dtype=dtype,
        quota=quota,
        peer_quota=peer_quota,
        when_full=when_full,
        threads=threads,
        max_sessions=max_sessions,
        record=record,
        store=store,
        store_quota=store_quota,
        tls_cert=tls_cert,
        tls_key=tls_key,
        peer=peer,
        unsafe_plain_tcp=unsafe_plain_tcp,
        json=as_json,
    )
    code = main(options)
    if code:
        raise typer.Exit(code)
