"""The inputs of a process that the cloud chooses: command line, environment, configuration. They are claims.

Every environment variable is claimed, with its value, but those on a short list that change nothing of what a program
of ours does. Whoever verifies names the others in his policy; one that he did not foresee fails.
"""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from obfuscatune.errors import ConfigError

HARMLESS = frozenset({"LANG", "LANGUAGE", "TERM", "COLORTERM", "PWD", "OLDPWD", "SHLVL", "_", "USER", "LOGNAME"})
"""What a shell sets for itself and for terminals. Not HOME: Python and Hugging Face read code and settings below it."""
HARMLESS_PREFIX = "LC_"
HARMLESS_OF_SYSTEMD = frozenset(
    {"INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID", "MEMORY_PRESSURE_WATCH", "MEMORY_PRESSURE_WRITE"}
)
"""Other at each start, and read by systemd's own library alone."""
MOST_VARIABLES = 256
MOST_BYTES = 64 * 1024


class Measured(NamedTuple):
    """Fields of the claims."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    configuration: str
    """SHA-256 of the configuration file, in hex."""


def measure_process(
    configuration: bytes, arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
) -> Measured:
    """What this process was started with.

    Args:
        configuration: the bytes that were parsed, not read a second time.
        arguments: unless said, `sys.orig_argv`: the interpreter and its own options too.
        environment: unless said, `started_environment()`.

    Raises:
        ConfigError: too much of it, or text that is none.
    """
    arguments = tuple(sys.orig_argv if arguments is None else arguments)
    claimed = {
        name: value
        for name, value in sorted((started_environment() if environment is None else environment).items())
        if not _is_harmless(name)
    }
    texts = (*arguments, *claimed, *claimed.values())
    try:
        size = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError:
        raise ConfigError("an argument or environment variable that is not UTF-8 cannot be claimed: unset it") from None
    if len(claimed) > MOST_VARIABLES or size > MOST_BYTES:
        raise ConfigError(
            f"{len(claimed)} environment variables and arguments of {size:,} bytes; at most {MOST_VARIABLES} and "
            f"{MOST_BYTES:,} can be claimed: start the enclave with a clean environment (env -i)"
        )
    return Measured(arguments, claimed, hashlib.sha256(configuration).hexdigest())


def started_environment(where: Path = Path("/proc/self/environ")) -> dict[str, str]:
    """The environment as the process was given it. `os.environ` has also what it and its libraries set since.

    Raises:
        ConfigError: the system does not tell, or a variable is there twice: which of them counts, is anybody's guess.
    """
    try:
        entries = where.read_bytes().split(b"\0")
    except OSError as error:
        raise ConfigError(f"cannot read {where}: {error.strerror}; an enclave runs on Linux") from error
    found: dict[str, str] = {}
    for entry in filter(None, entries):
        name, separator, value = os.fsdecode(entry).partition("=")
        if not separator or name in found:
            raise ConfigError(f"the environment has {name!r:.80} twice, or without a value: start with a clean one")
        found[name] = value
    return found


def _is_harmless(name: str) -> bool:
    return name in HARMLESS or name in HARMLESS_OF_SYSTEMD or name.startswith(HARMLESS_PREFIX)
