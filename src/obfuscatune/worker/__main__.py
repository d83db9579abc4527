"""`python -m obfuscatune.worker`: the worker with nothing of the enclave around it."""

import os
import sys

# Before torch is imported, which reads it then: threads that wait for the next product must not spin on cores that the
# enclave, or another worker, computes on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from obfuscatune.wire.errors import ObfuscaTuneError
from obfuscatune.worker.options import parse_arguments
from obfuscatune.worker.run import run


def main() -> int:
    """Run a worker; 0 after a graceful end, 2 after a bad option."""
    options = parse_arguments(sys.argv[1:])
    try:
        run(options)
    except ObfuscaTuneError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
