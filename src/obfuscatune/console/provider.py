"""The provider's console: sealed models, grants and what was used of them, consents to give, keys that were released.

Each look at the enclave is a session of its own, verified anew; nothing is released in one that is not.
"""

import datetime
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Form, HTTPException, Request
from fastapi.responses import Response

from obfuscatune.attest.record import Verification
from obfuscatune.channel.client import Attested
from obfuscatune.channel.grants import EXPORTS, USES, Consent, Grant, Revocation, Terms, next_sequence, read_time
from obfuscatune.channel.identity import Identity
from obfuscatune.console.assessment import assess, assess_checks
from obfuscatune.console.pages import text
from obfuscatune.console.releases import Releases
from obfuscatune.console.shell import Shell, attachment
from obfuscatune.console.views import Model
from obfuscatune.errors import ConfigError, IntegrityError, ObfuscaTuneError, VerificationFailed
from obfuscatune.protocol.addresses import TcpAddress
from obfuscatune.protocol.certificates import fingerprint
from obfuscatune.sealing.key_file import KeyFile

NAVIGATION = (("/", "provider.grants"), ("/models", "provider.models"), ("/releases", "provider.releases"))
_SECONDS_KEPT = 2.0
"""For which a look at the enclave serves all that ask."""
_DAYS = 90
"""For which a grant stands unless its provider chooses otherwise."""
_MOST_KEY_FILES = 256
_MOST_CERTIFICATES = 64 * 2**10
Text = Annotated[str, Form(min_length=1, max_length=1024)]
Hex = Annotated[str, Form(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class SealedModel:
    """A bundle whose key lies in the folder of keys. The key itself stays in its file."""

    file: str
    manifest: str
    is_ours: bool
    """Whether this identity sealed it: no other can grant it."""


@dataclass(frozen=True)
class Look:
    """What the enclave told in one verified session."""

    record: Verification
    models: tuple[Model, ...]
    enclave_key: str


class ProviderConnection:
    """Sessions with one enclave, and the folder of keys. Safe from any thread.

    Args:
        connect: Opens a session with the enclave and verifies it.
        enclave: Where that is.
        keys: A folder of key files, as `provider seal --key-out` writes them.
        releases: A folder that keeps what was released.
    """

    def __init__(
        self, connect: Callable[[], Attested], enclave: TcpAddress, identity: Identity, keys: Path, releases: Path
    ) -> None:
        if not keys.is_dir():
            raise ConfigError(f"--keys {keys}: there is no such folder")
        self._connect, self.enclave, self.identity, self._keys = connect, enclave, identity, keys
        self.releases = Releases(releases)
        self.signer = identity.key.public_key().public_bytes_raw().hex()
        self._lock = threading.Lock()
        self._look: tuple[float, Look] | None = None
        self.failed: VerificationFailed | None = None
        """Why the last session was refused, where it was."""
        self.is_simulated = False
        """Whether the evidence of the last session was."""

    def session(self) -> Attested:
        """A session, verified.

        Raises:
            VerificationFailed: the policy refuses the enclave. It is told in `failed` until another is accepted.
        """
        try:
            session = self._connect()
        except VerificationFailed as error:
            self.failed = error
            raise
        self.failed, self.is_simulated = None, session.record.simulated
        return session

    def look(self, *, anew: bool = False) -> Look:
        """What stands of the grants.

        Raises:
            As `session`, and as `Attested.request`.
        """
        with self._lock:
            if self._look is not None and not anew and time.monotonic() - self._look[0] < _SECONDS_KEPT:
                return self._look[1]
            self._look = None
            with self.session() as session:
                told = session.request("status", {}).get("models")
                models = tuple(Model.read(it) for it in told) if isinstance(told, list) else ()
                look = Look(session.record, models, session.enclave_key)
            self._look = time.monotonic(), look
            return look

    def sealed_models(self) -> list[SealedModel]:
        """The key files, by name. What is none is left out."""
        found = []
        for path in sorted(self._keys.glob("*.key"))[:_MOST_KEY_FILES]:
            try:
                kept = KeyFile.read(path)
            except ConfigError:
                continue
            kept.key.close()
            if kept.kind == "model":
                found.append(SealedModel(path.name, kept.manifest_digest, kept.signer == self.signer))
        return found

    def grant(self, file: str, name: str, storage: str, terms: Terms) -> None:
        """Release a bundle's key to the enclave, with the terms of its use, and keep on what evidence.

        Raises:
            ConfigError: the key file is not this folder's, another identity sealed its bundle, or the terms cannot be
                granted.
            As `look`.
        """
        if file not in {it.file for it in self.sealed_models() if it.is_ours}:
            raise ConfigError(text("error.no_key_file"))
        kept = KeyFile.read(self._keys / file)
        try:
            with _of_the_form():
                granted = Grant(name, kept.manifest_digest, storage, terms, next_sequence())
            with self.session() as session, kept.key.secret.view as view:
                self.releases.keep(granted, str(self.enclave), session.record)  # written before anything goes out
                session.release("grant", granted.sign(self.identity), bytes(view))
        finally:
            kept.key.close()
        self._look = None

    def tell(self, kind: str, document: Consent | Revocation) -> None:
        """Sign a consent or a revocation, and send it to the enclave, verified anew."""
        with self.session() as session:
            session.request(kind, document.sign(self.identity))
        self._look = None


def provider_console(connection: ProviderConnection, tell: Callable[[str], None]) -> Shell:
    """The provider's pages.

    Args:
        tell: Says something where the console was started: a new link.
    """
    shell = Shell("provider", NAVIGATION, tell, lambda: {"simulated": connection.is_simulated})
    router = shell.router

    @router.get("/")
    def grants(request: Request) -> Response:
        """What stands of the grants, on what evidence, and who waits for a consent."""
        try:
            look, refused = connection.look(), None
        except ObfuscaTuneError as error:
            look, refused = None, error
        checks = connection.failed.checks if connection.failed is not None else ()
        assessment = assess(look.record) if look is not None else assess_checks(checks)
        return shell.page(
            request,
            "provider/grants.html",
            status=200 if look is not None else 503,
            look=look,
            assessment=assessment,
            told="" if refused is None else str(refused),
            enclave=str(connection.enclave),
            exports=EXPORTS,
        )

    @router.get("/models")
    def models(request: Request) -> Response:
        """Sealed models, and the form of a grant."""
        found = connection.sealed_models()
        until = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=_DAYS)
        return shell.page(request, "provider/models.html", models=found, exports=EXPORTS, until=until)

    @router.get("/releases")
    def releases(request: Request) -> Response:
        """Where keys were released, and on what evidence."""
        return shell.page(request, "provider/releases.html", releases=connection.releases.all())

    @router.get("/releases/{release_id}.json")
    def release(release_id: str) -> Response:
        """The verification document of a release, for `obfuscatune verify`."""
        content = connection.releases.document(release_id)
        if content is None:
            raise HTTPException(404)
        return attachment(content, f"{release_id}.json", "application/json")

    @router.post("/grants")
    def grant(
        file: Text,
        name: Text,
        bundle: Text,
        owners: Annotated[str, Form(min_length=1, max_length=_MOST_CERTIFICATES)],
        until: Text,
        export: Text,
        uses: Annotated[list[str], Form()],
        tokens: Annotated[str, Form(max_length=20)] = "",
    ) -> Response:
        """Release a key."""
        limit = None
        if tokens.strip():
            if not (tokens.strip().isascii() and tokens.strip().isdigit()):
                raise ConfigError(text("error.tokens"))
            limit = int(tokens)
        allowed = tuple(use for use in USES if use in uses)
        with _of_the_form():
            terms = Terms(read_owners(owners), allowed, export, read_time(until), limit)
        connection.grant(file, name, bundle, terms)
        return shell.redirect("/")

    @router.post("/revoke")
    def revoke(name: Text, manifest: Hex) -> Response:
        """Take back what was granted for a model."""
        connection.tell("revoke", Revocation(name, manifest, next_sequence()))
        return shell.redirect("/")

    @router.post("/consent")
    def consent(name: Text, manifest: Hex, owner: Hex, adapter: Text) -> Response:
        """Let one adapter leave, to its owner."""
        connection.tell("consent", Consent(name, manifest, owner, adapter))
        return shell.redirect("/")

    return shell


@contextmanager
def _of_the_form() -> Iterator[None]:
    """Within it, what cannot be signed is a field that somebody filled in."""
    try:
        yield
    except IntegrityError as error:
        raise ConfigError(str(error)) from None


def read_owners(given: str) -> tuple[str, ...]:
    """Fingerprints of owners' keys, of certificates in PEM or as they are, one a line.

    Raises:
        ConfigError: something is neither.
    """
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    found: list[str] = []
    rest = given
    while begin in rest:
        before, _, after = rest.partition(begin)
        body, ended, tail = after.partition(end)
        if not ended:
            raise ConfigError(text("error.certificate_end"))
        try:
            found.append(fingerprint(f"{begin}{body}{end}\n".encode()))
        except ValueError:
            raise ConfigError(text("error.certificate")) from None
        rest = before + "\n" + tail
    found += rest.split()
    return tuple(dict.fromkeys(found))
