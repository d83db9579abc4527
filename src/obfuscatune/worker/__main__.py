"""`python -m obfuscatune.worker`: the worker with nothing of the enclave around it."""

import sys

from obfuscatune.errors import ObfuscaTuneError
from obfuscatune.machine import refusal
from obfuscatune.process import settle_process
from obfuscatune.worker.options import WorkerOptions, parse_arguments


def main(options: WorkerOptions) -> int:
    """Run a worker; 0 after a graceful end, 1 when it had to stop, 2 after an option that cannot be used."""
    if line := refusal():
        sys.stderr.write(f"error: {line}\n")
        return 2
    settle_process()
    from obfuscatune.worker.server import run  # imports torch, which reads the environment then

    try:
        return run(options)
    except ObfuscaTuneError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(parse_arguments(sys.argv[1:])))
