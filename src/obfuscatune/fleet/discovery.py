"""Finds a fleet's members: fetches the operators' list by HTTP, again and again, and trusts nothing in it.

The enclave never joins the cluster that runs the workers. All it takes from there is this list (`listing` has its
format): a bounded number of bytes, parsed strictly, each certificate held against the policy before any connection is
made. Who serves the list can leave members out or send an old one; the work then waits or slows down, and nothing is
shown to anybody. So plain HTTP will do.

A list that cannot be fetched, is malformed or holds nobody whom the policy accepts leaves the last good one in force.
"""

import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from obfuscatune.errors import ConfigError, DiscoveryError, UntrustedPeer
from obfuscatune.fleet.listing import MAX_LIST_BYTES, parse_list
from obfuscatune.fleet.members import Member

FETCH_SECONDS = 10.0
"""Longest time from connecting to the last byte of a list."""
REFRESH_SECONDS = 5.0
"""Between two looks at the list."""
DEFAULT_PATH = "/fleet.json"

Check = Callable[[Member], None]
"""Raises UntrustedPeer for a member that the policy does not accept."""
Say = Callable[[str], None]


class Discovery:
    """The members that a list names and a policy accepts, kept up to date by a thread of its own."""

    def __init__(
        self,
        url: str,
        check: Check,
        *,
        say: Say,
        changed: Callable[[tuple[Member, ...]], None] | None = None,
        interval: float = REFRESH_SECONDS,
    ) -> None:
        """Read the list once.

        Args:
            url: Where the list is, as http://HOST:PORT/fleet.json; http or https.
            check: The policy.
            say: Is told, in one line, what is wrong with a list or a member; once for as long as it stays so.
            changed: Is given the new members when they change after this. Called in the thread of `start`.
            interval: Seconds between two looks.

        Raises:
            ConfigError: the URL cannot be used.
            DiscoveryError: there is no list with a member that the policy accepts.
        """
        split_url(url)
        self._url, self._check, self._say, self._changed, self._interval = url, check, say, changed, interval
        self._said: frozenset[str] = frozenset()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._members = self._look()

    @property
    def members(self) -> tuple[Member, ...]:
        """Those of the last good list that the policy accepts."""
        return self._members

    def refresh(self) -> tuple[Member, ...]:
        """Look at the list now. Where it is no good, say so and return the members that were there before."""
        try:
            members = self._look()
        except DiscoveryError as error:
            self._tell({f"{error}; going on with the {len(self._members)} members known before"})
            return self._members
        if members != self._members:
            self._members = members
            if self._changed is not None:
                self._changed(members)
        return members

    def start(self) -> None:
        """Look again at intervals, until `close`."""
        self._thread = threading.Thread(target=self._run, name="discovery", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking. Twice is once."""
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(FETCH_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self.refresh()

    def _look(self) -> tuple[Member, ...]:
        """Fetch, parse, and leave out whom the policy does not accept."""
        accepted, refused = [], {}
        for member in parse_list(fetch(self._url)):
            try:
                self._check(member)
                accepted.append(member)
            except UntrustedPeer as error:
                refused[f"the fleet's member {member.address} is left out: {error}"] = error
        if not accepted:
            first = next(iter(refused), "")
            raise DiscoveryError(f"the policy accepts none of the members that {self._url} lists: {first}")
        self._tell(set(refused))
        return tuple(accepted)

    def _tell(self, lines: set[str]) -> None:
        for line in sorted(lines - self._said):
            self._say(line)
        self._said = frozenset(lines)


def split_url(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path of a list's URL.

    Raises:
        ConfigError: it cannot be used: neither http nor https, or with more than host, port and path.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"the address of a fleet's list cannot be used: {error}") from error
    plain = url.isascii() and url.isprintable() and " " not in url
    if not plain or parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError("the address of a fleet's list is written http://HOST:PORT/fleet.json, or https")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError("the address of a fleet's list has a host, a port and a path, and nothing else")
    path = parts.path if parts.path.strip("/") else DEFAULT_PATH
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), path


def fetch(url: str, seconds: float = FETCH_SECONDS) -> bytes:
    """The bytes at `url`, at most `MAX_LIST_BYTES`, within `seconds`. No redirect is followed, no proxy is asked.

    Raises:
        DiscoveryError: there is nothing, or too much, or not in time.
    """
    scheme, host, port, path = split_url(url)
    connection: http.client.HTTPConnection
    if scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=seconds, context=ssl.create_default_context())
    else:
        connection = http.client.HTTPConnection(host, port, timeout=seconds)
    late = threading.Event()
    try:
        connection.connect()
        timer = threading.Timer(seconds, _cut, [connection.sock, late])
        timer.daemon = True
        timer.start()
        try:
            connection.request("GET", path, headers={"Accept": "application/json", "Connection": "close"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise DiscoveryError(f"no list of the fleet at {url}: HTTP status {response.status}")
            data = response.read(MAX_LIST_BYTES + 1)
        finally:
            timer.cancel()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DiscoveryError(f"no list of the fleet at {url}: {_reason(error)}") from error
    finally:
        connection.close()
    if late.is_set():
        raise DiscoveryError(f"no list of the fleet at {url}: it did not end within {seconds:g} s")
    if len(data) > MAX_LIST_BYTES:
        raise DiscoveryError(f"the list of the fleet at {url} is longer than {MAX_LIST_BYTES:,} bytes")
    return data


def _reason(error: Exception) -> str:
    """Ours or the system's words; http.client's errors quote the server's."""
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _cut(sock: socket.socket, late: threading.Event) -> None:
    """End a connection whose time is over, whatever its peer sends meanwhile; its reader takes that for the end."""
    late.set()
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
