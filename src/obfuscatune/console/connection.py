"""The owner's service, verified and kept verified while his console runs, and what was found of it.

`client.proxy.Supervisor` decides whether it stands; nothing is asked of a service that does not.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import httpx

from obfuscatune.attest.checks import Check
from obfuscatune.attest.record import Verification
from obfuscatune.channel.client import Attested
from obfuscatune.channel.identity import Identity
from obfuscatune.client.connection import Opened, Service, open_api
from obfuscatune.client.heads import HeadFile
from obfuscatune.client.proxy import Standing, Supervisor
from obfuscatune.console.pages import text
from obfuscatune.errors import ConnectionLost, VerificationFailed
from obfuscatune.protocol.addresses import TcpAddress

_TIMEOUT = httpx.Timeout(10.0, read=600.0, write=60.0)


@dataclass(frozen=True)
class Found:
    """What the last verification found."""

    record: Verification | None
    """None where there was none to speak of: the enclave could not be reached."""
    failed: tuple[Check, ...] = ()
    """The checks of evidence that was refused."""
    enclave_key: str = ""


class OwnerConnection:
    """A service that is verified again before its verification ends. Safe from any thread.

    Args:
        connect: Opens a session with the enclave and verifies it.
        enclave: Where that is.
        api: Where its API is, where that is not what the enclave says.
        heads: Where the newest head of its audit log is kept; None does not notice a state that was set back.
        tell: Hears why nothing passes any more.
    """

    def __init__(
        self,
        connect: Callable[[], Attested],
        enclave: TcpAddress,
        identity: Identity,
        *,
        api: TcpAddress | None = None,
        heads: HeadFile | None = None,
        tell: Callable[[str], None],
    ) -> None:
        self._connect, self.enclave, self.identity = connect, enclave, identity
        self._api, self._heads = api, heads
        self.supervisor = Supervisor(self._verify, tell)
        self._lock = threading.Lock()
        self._found = Found(None)
        self._clients: dict[tuple[str, str], tuple[Opened, httpx.Client]] = {}

    @property
    def found(self) -> Found:
        """What the last verification found."""
        return self._found

    @property
    def seconds_left(self) -> float | None:
        """For how long the verification counts; None where it does not."""
        standing = self.supervisor.standing()
        return None if standing is None else max(0.0, standing.until - time.monotonic())

    @property
    def service(self) -> Service:
        """The service.

        Raises:
            VerificationFailed: it does not stand.
            ConnectionLost: it is another one since a moment ago.
        """
        standing = self.supervisor.standing()
        if standing is None:
            raise VerificationFailed(self.supervisor.refusal, self._found.failed)
        with self._lock:
            client = self._clients.get((standing.url, standing.spki_sha256))
        if client is None:
            raise ConnectionLost(text("error.verified_anew"))
        opened, http = client
        return Service(opened.url, http, opened.context, opened.verified)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the enclave is verified again and again."""
        with self.supervisor.running():
            try:
                yield
            finally:
                with self._lock:
                    for _, http in self._clients.values():
                        http.close()

    def _verify(self) -> Standing:
        began = time.monotonic()
        try:
            session = self._connect()
        except VerificationFailed as error:
            self._found = replace(self._found, record=None, failed=tuple(error.checks))
            raise
        found = Found(session.record, (), session.enclave_key)
        self._found = found
        opened = open_api(session, self.enclave, self.identity, api=self._api, heads=self._heads)
        standing = Standing(
            opened.url,
            opened.verified.claims.http_key,
            opened.context,
            began + (opened.verified.expires - opened.verified.time),
            opened.check_log,
        )
        key = standing.url, standing.spki_sha256
        with self._lock:
            if key not in self._clients:  # requests under way end on the older client
                http = httpx.Client(base_url=opened.url, verify=opened.context, timeout=_TIMEOUT, trust_env=False)
                self._clients = {key: (opened, http)}
        return standing
