"""The folder of a fleet: one supervisor at a time holds its lock, and its files say how to find and end the fleet."""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from obfuscatune import documents
from obfuscatune.errors import ConfigError, ConnectionLost, IntegrityError, StorageError

STOP_SECONDS = 60.0
"""From SIGTERM to giving up: each worker may answer what it was asked before."""
_LOCK, _FLEET, _LIST = "lock", "fleet-up.json", "fleet.json"


@dataclass(frozen=True)
class FleetState:
    """What `fleet up` was told, as far as `fleet status` and `fleet down` must know it."""

    name: str
    engine: str
    cluster: str | None
    """The address of Ray's cluster."""
    workers: int
    url: str
    """Of the list."""


class StateFolder:
    """A folder on the operator's machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def authority(self) -> Path:
        """Where the authority is, unless another is named."""
        return self.path / "authority"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only supervisor of this folder.

        Raises:
            ConfigError: another one is.
            StorageError: the folder cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = (self.path / _LOCK).open("a+b")
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"the fleet of {self.path} is up already: `obfuscatune fleet down` ends it") from None
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            file.flush()
            yield

    def write(self, state: FleetState) -> None:
        """Keep how the fleet was started."""
        self._write(_FLEET, json.dumps(asdict(state), indent=1).encode() + b"\n")

    def write_list(self, data: bytes) -> None:
        """Keep the newest list beside it, for who wants to publish it by other means."""
        self._write(_LIST, data)

    def read(self) -> FleetState:
        """Raises ConfigError: the folder has no fleet."""
        try:
            document = documents.parse((self.path / _FLEET).read_bytes())
            return FleetState(**document)
        except (OSError, IntegrityError, TypeError) as error:
            raise ConfigError(
                f"{self.path} has no fleet: `obfuscatune fleet up --state {self.path}` makes one"
            ) from error

    def forget(self) -> None:
        """The fleet has ended."""
        (self.path / _FLEET).unlink(missing_ok=True)

    def supervisor(self) -> int | None:
        """The process id of the supervisor that holds the lock; None where none does."""
        try:
            with (self.path / _LOCK).open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    return int(file.read(20))
        except (OSError, ValueError):
            pass
        return None

    def stop_supervisor(self) -> bool:
        """Ask it to end, and wait for it. False where there is none.

        Raises:
            ConnectionLost: it goes on.
        """
        pid = self.supervisor()
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        while self.supervisor() == pid:
            if time.monotonic() > until:
                raise ConnectionLost(f"the supervisor (process {pid}) does not end; its workers may be busy")
            time.sleep(0.1)
        return True

    def _write(self, name: str, data: bytes) -> None:
        draft = self.path / f".{name}.{secrets.token_hex(8)}"
        try:
            draft.write_bytes(data)
            draft.replace(self.path / name)
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error.strerror}") from error
