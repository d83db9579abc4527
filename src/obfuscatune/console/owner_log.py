"""The enclave's audit log, as its owner may read it: fetched whole, verified, and then shown.

service -> lines, bounded -> chain and signed head (channel/audit_chain.py) -> the newest entries in clear
"""

import tempfile
from collections import deque
from dataclasses import dataclass
from typing import IO, Any, cast

import httpx
from fastapi import Request
from fastapi.responses import Response

from obfuscatune.channel.audit_chain import MOST_LINE_BYTES, Head, parse_line, verify_copy
from obfuscatune.client.connection import Service
from obfuscatune.console.connection import OwnerConnection
from obfuscatune.console.pages import text
from obfuscatune.console.shell import Shell, attachment
from obfuscatune.errors import ChannelError, ConnectionLost, IntegrityError

MOST_BYTES = 64 * 2**20
"""Of a log: some 280,000 entries."""
MOST_SHOWN = 200
LEFT = frozenset({"adapter-exported", "file-read"})
"""What is logged where something left the enclave that is not an answer."""
_MOST_TEXT = 80


@dataclass(frozen=True)
class Entry:
    """Something that was done, by the owner or by the service itself."""

    number: int
    at: int
    what: str
    is_own: bool
    details: tuple[tuple[str, str], ...]

    @property
    def left(self) -> bool:
        """Whether something left the enclave."""
        return self.what in LEFT


@dataclass(frozen=True)
class Log:
    """A log that verified."""

    head: Head
    clear: int
    """How many of its entries are the owner's or the service's."""
    entries: tuple[Entry, ...]
    """The newest of these, the newest first."""


def add(shell: Shell, connection: OwnerConnection) -> None:
    """Add the page of the log."""

    @shell.router.get("/log")
    def log(request: Request) -> Response:
        """What was done, by the enclave's signed log."""
        owner = connection.identity.fingerprint
        key = connection.service.verified.claims.signing_key
        try:
            with fetched(connection.service) as file:
                found, broken = read_log(file, key, owner), ""
        except IntegrityError as error:
            found, broken = None, str(error)
        status = 200 if found is not None else 502
        return shell.page(request, "owner/log.html", status=status, log=found, broken=broken, key=key)

    @shell.router.get("/log.jsonl")
    def copy() -> Response:
        """The owner's copy of the log, for `obfuscatune verify-log`."""
        with fetched(connection.service) as file:
            return attachment(file.read(), "audit.jsonl", "application/jsonl")


def fetched(service: Service) -> IO[bytes]:
    """The owner's copy of the log as a file, which is the caller's to close.

    Raises:
        ConnectionLost, ChannelError: it did not come, or is longer than any that is read.
    """
    file = cast(IO[bytes], tempfile.SpooledTemporaryFile(4 * 2**20))  # noqa: SIM115  returned
    try:
        with service.http.stream("GET", "/obfuscatune/v1/audit-log") as reply:
            if reply.is_error:
                raise ChannelError(text("error.no_log", status=reply.status_code))
            for piece in reply.iter_bytes():
                if file.tell() + len(piece) > MOST_BYTES:
                    raise ChannelError(text("error.log_long", most=f"{MOST_BYTES:,}"))
                file.write(piece)
    except httpx.TransportError as error:
        file.close()
        raise ConnectionLost(text("error.log_gone")) from error
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def read_log(file: IO[bytes], key: str, owner: str) -> Log:
    """Verify a copy, and read its newest entries.

    Args:
        key: which the enclave's evidence names, in hex: it must have signed the head.
        owner: whose entries are his own.

    Raises:
        IntegrityError: entries were changed, left out or reordered, or the head is another's.
    """
    head, clear = verify_copy(cast(Any, file), frozenset({key}))
    file.seek(0)
    newest: deque[Entry] = deque(maxlen=MOST_SHOWN)
    for number in range(head.count):
        fields = parse_line(file.readline(MOST_LINE_BYTES + 1), number)
        if "entry" in fields:
            newest.append(_entry(fields["entry"], owner))
    return Log(head, clear, tuple(reversed(newest)))


def _entry(entry: dict[str, Any], owner: str) -> Entry:
    number, at, who, what, details = (entry[name] for name in ("n", "at", "who", "what", "details"))
    if type(at) is not int or not isinstance(what, str) or not isinstance(details, dict):
        raise IntegrityError(text("error.log_entry", number=number))
    plain = ((name, it) for name, it in details.items() if type(it) in (str, int))
    return Entry(number, at, what[:_MOST_TEXT], who == owner, tuple((name, str(it)[:_MOST_TEXT]) for name, it in plain))
