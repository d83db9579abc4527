"""`obfuscatune worker`."""

import typer

from obfuscatune.worker.__main__ import main
from obfuscatune.worker.options import WorkerOptions


def worker(options: WorkerOptions) -> None:
    """Run the untrusted worker, until Ctrl-C: it holds matrices it knows nothing about, and multiplies by them.

    It needs nothing of the enclave: `python -m obfuscatune.worker` takes the same options and does the same.
    """
    code = main(options)
    if code:
        raise typer.Exit(code)
