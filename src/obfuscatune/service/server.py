"""The whole service, started and stopped.

settings -> keys of this start -> claims -> evidence -> attested channel, HTTPS API, jobs
SIGTERM: nothing new is taken, answers end, jobs write checkpoints, the log is closed
"""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from obfuscatune.attest.claims import Claims, Software
from obfuscatune.attest.evidence import Producer
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.measure import Measured
from obfuscatune.channel.server import ChannelServer
from obfuscatune.console.operator import operator_console
from obfuscatune.errors import ConfigError
from obfuscatune.protocol.endpoints import TcpAddress
from obfuscatune.protocol.files import read_secret
from obfuscatune.secret_memory import forbid_dumps
from obfuscatune.service import tables as rows
from obfuscatune.service.access import Access
from obfuscatune.service.api.app import make_app, make_operator_app
from obfuscatune.service.api.context import Context
from obfuscatune.service.api.tls import Gate, Handshakes, HttpsIdentity
from obfuscatune.service.audit_log import SERVICE, AuditLog
from obfuscatune.service.handler import ServiceHandler
from obfuscatune.service.job_results import Outcome
from obfuscatune.service.jobs import Jobs
from obfuscatune.service.keys import Owner, Owners
from obfuscatune.service.limits import RateLimits
from obfuscatune.service.metrics import Metrics
from obfuscatune.service.models import Models
from obfuscatune.service.operator import looker
from obfuscatune.service.provider_words import ProviderWords
from obfuscatune.service.receipt import Attestation, about_job, make_receipt, receipt_digest
from obfuscatune.service.settings import Settings, Simulated, Tpm
from obfuscatune.service.state import Row, State
from obfuscatune.training.storage import RunDirectory
from obfuscatune.version import __version__

log = logging.getLogger(__name__)
AUDIT_LOG = "audit.jsonl"
_MAX_HEADER_BYTES = 32 * 2**10
_KEEP_ALIVE_SECONDS = 30
_MEASURED = frozenset({".py", ".so", ".html", ".css", ".js", ".toml"})
"""Kinds of the package's files that decide what it does: templates are programs, too."""


@dataclass(frozen=True)
class Listening:
    """Where a service can be reached."""

    api: str
    channel: str
    operator: str | None
    console: str | None
    """The operator's one-time link."""
    signing_key: str
    http_key: str
    warnings: tuple[str, ...]
    repaired_bytes: int


def make_producer(settings: Settings) -> Producer:
    """What gives evidence on this platform.

    Raises:
        ConfigError: its key cannot be read.
        EvidenceError: the platform gives none.
    """
    match settings.attestation:
        case Simulated(key_file=path):
            from obfuscatune.attest.simulated import Simulated as SimulatedProducer

            return SimulatedProducer(_signing_key(path))
        case Tpm() as tpm:
            from obfuscatune.attest.producers import Tpm as TpmProducer

            return TpmProducer(tpm.handle, tpm.pcrs, tpm.tcti)
        case _:
            from obfuscatune.attest.producers import ConfigfsTsm

            return ConfigfsTsm()


def make_claims(settings: Settings, measured: Measured, *, http_key: str, hpke_key: str, signing_key: str) -> Claims:
    """What this service says of itself.

    Raises:
        ConfigError: a worker's certificate cannot be read.
    """

    return Claims(
        software=Software("obfuscatune", __version__, software_digest()),
        configuration=measured.configuration,
        http_key=http_key,
        hpke_key=hpke_key,
        signing_key=signing_key,
        boot=secrets.token_hex(32),
        profile=settings.profile,
        arguments=measured.arguments,
        environment=measured.environment,
        workers=settings.trusted_keys("compute"),
        mask_workers=settings.trusted_keys("mask"),
    )


def policy_of_claims(settings: Settings, measured: Measured) -> dict[str, Any]:
    """The section `claims` of a policy that accepts this service and no other, for whoever has read its settings.

    Raises:
        ConfigError: a worker's certificate cannot be read.
    """
    return {
        "configuration": [measured.configuration],
        "arguments": [list(measured.arguments)],
        "environment": {name: [value] for name, value in measured.environment.items()},
        "software": [software_digest()],
        "workers": list(settings.trusted_keys("compute")),
        "mask_workers": list(settings.trusted_keys("mask")),
        "least_profile": settings.profile,
    }


def software_digest() -> str:
    """SHA-256 over the names and contents of this package's files."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix in _MEASURED:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()


class Service:
    """A service, from start to stop."""

    def __init__(self, settings: Settings, measured: Measured, tell: Callable[[str], None] = log.info) -> None:
        """Make its parts; nothing listens yet.

        Args:
            tell: Says something to the operator: a new link to his console.

        Raises:
            ConfigError, StorageError, IntegrityError, EvidenceError: a part cannot be had.
        """
        self.settings = settings
        self._warnings = forbid_dumps()
        signing_key, self._hpke_key = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._signing_key = signing_key
        self._https = HttpsIdentity()
        self._claims = make_claims(
            settings,
            measured,
            http_key=self._https.spki,
            hpke_key=self._hpke_key.public_key().public_bytes_raw().hex(),
            signing_key=signing_key.public_key().public_bytes_raw().hex(),
        )
        self._producer = make_producer(settings)
        attestation = Attestation.make(self._claims, self._producer)
        with ExitStack() as stack:
            storage = RunDirectory(settings.state)
            (settings.state / "runs").mkdir(mode=0o700, exist_ok=True)
            audit = AuditLog(settings.state / AUDIT_LOG, signing_key)
            stack.callback(audit.close)
            state = State(settings.database_url)
            stack.callback(state.close)
            owners = Owners()
            jobs = Jobs(self._record)
            models = Models(settings, owners, lambda _: jobs.wake())
            words = ProviderWords(state, audit)
            access = Access(words.registry(), state)
            self.context = Context(
                *(settings, state, storage, owners, access, models),
                *(RateLimits(settings.limits), Metrics(), audit, attestation, jobs, words),
            )
            self._console = operator_console(looker(self.context), tell)
            self._sweep()
            audit.append(
                SERVICE, "started", {"signing_key": self._claims.signing_key, "claims": self._claims.digest.hex()}
            )
            self._repaired = audit.repaired
            self._resources = stack.pop_all()
        self._watch()

    @contextmanager
    def listening(self) -> Iterator[tuple[Listening, list[socket.socket]]]:
        """Bind everything, serve the attested channel and run jobs while the `with` lasts.

        Raises:
            ConfigError: an address cannot be bound.
        """
        settings = self.settings
        with ExitStack() as stack:
            stack.callback(self._close)
            api = stack.enter_context(_bound(settings.listen.host, settings.listen.port))
            sockets = [api]
            if settings.operator is not None:
                sockets.append(stack.enter_context(_bound(settings.operator.host, settings.operator.port)))
            addresses = [_address(it) for it in sockets]
            self._console.origin = f"http://{addresses[-1]}"
            handler = ServiceHandler(self.context, self._https, addresses[0])
            channel = ChannelServer(
                TcpAddress(settings.channel.host, settings.channel.port),
                Identity.generate("obfuscatune"),
                self._claims,
                self._producer,
                handler,
                self._hpke_key,
            )
            self.context.jobs.start(self.context)
            channel.start()
            stack.callback(channel.stop)
            where = Listening(
                addresses[0],
                f"{channel.address.host}:{channel.address.port}",
                addresses[1] if len(addresses) > 1 else None,
                self._console.link() if len(addresses) > 1 else None,
                self._claims.signing_key,
                self._https.spki,
                self._warnings,
                self._repaired,
            )
            yield where, sockets

    def run(self, told: Callable[[Listening], None]) -> None:
        """Serve until SIGTERM or SIGINT. `told` is called once everything listens.

        Raises:
            ConfigError: an address cannot be bound.
        """
        with self.listening() as (where, sockets):
            asyncio.run(self._serve(sockets, lambda: told(where)))

    async def _serve(self, sockets: list[socket.socket], ready: Callable[[], None]) -> None:
        limits = self.settings.limits
        common: dict[str, Any] = {
            "access_log": False,
            "log_config": None,
            "server_header": False,
            "proxy_headers": False,
            "lifespan": "off",
            "ws": "none",
            "loop": "asyncio",
            "h11_max_incomplete_event_size": _MAX_HEADER_BYTES,
            "timeout_keep_alive": _KEEP_ALIVE_SECONDS,
            "timeout_graceful_shutdown": limits.drain_seconds,
        }
        handshakes = Handshakes(self._https.context, max(1, limits.connections // 2))
        gate = cast(type[asyncio.Protocol], partial(Gate, handshakes))
        api = uvicorn.Config(make_app(self.context), http=gate, limit_concurrency=limits.connections, **common)
        servers = [_Server(api, handshakes)]
        if len(sockets) > 1:
            console = make_operator_app(self.context, self._console.asgi(), self._console.base)
            servers.append(_Server(uvicorn.Config(console, http="h11", **common)))
        loop = asyncio.get_running_loop()

        def end() -> None:
            for server in servers:
                server.should_exit = True

        for signum in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread
                loop.add_signal_handler(signum, end)
        tasks = [asyncio.create_task(it.serve([sock])) for it, sock in zip(servers, sockets, strict=True)]
        while not all(server.started or task.done() for server, task in zip(servers, tasks, strict=True)):
            await asyncio.sleep(0.01)
        ready()
        await asyncio.gather(*tasks)

    def _close(self) -> None:
        limits, context = self.settings.limits, self.context
        context.jobs.stop(limits.drain_seconds)
        context.models.close()
        context.log.append(SERVICE, "stopped")
        self._resources.close()

    def _record(self, context: Context, owner: Owner, row: Row, outcome: Outcome) -> None:
        """Write the receipt of a job."""
        model = context.models.get(row.clear["model"])
        if model is None:
            return
        grant = model.grant
        about = about_job(
            job=row.id,
            owner=owner.spki,
            model={"name": grant.model, "manifest": grant.manifest, "grant": grant.id, "provider": grant.provider},
            data=row.details["data"],
            recipe={**row.details["hyperparameters"], **row.details["recipe"], "seed": row.details["seed"]},
            adapter=outcome.adapter,
            products=outcome.products,
            masks=outcome.done.get("masks"),
            losses=outcome.losses_digest,
            steps=int(outcome.done["steps"]),
            tokens=outcome.tokens,
            began=row.created_at,
        )
        signed = make_receipt(about, context.attested, self._signing_key)
        kept = context.state.add(rows.receipts, owner, f"receipt-{row.id[6:]}", signed, job=row.id)
        context.log.append(owner.spki, "receipt", {"job": row.id, "receipt": receipt_digest(kept.details)})

    def _sweep(self) -> None:
        """Remove what a killed service left: files without a row, run directories without a job."""
        context = self.context
        context.storage.clean()
        known = context.state.ids(rows.files)
        folder = self.settings.state / context.files
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in known:
                context.storage.remove_file(str(context.files / path.name))
        jobs = context.state.ids(rows.jobs)
        for path in (self.settings.state / "runs").iterdir():
            if path.name not in jobs:
                context.storage.remove_directory(f"runs/{path.name}")

    def _watch(self) -> None:
        metrics, context = self.context.metrics, self.context
        metrics.observe("obfuscatune_jobs", "Jobs, by status.", context.state.job_states, "status")
        metrics.observe("obfuscatune_models", "Models, by status.", context.models.states, "status")
        metrics.observe("obfuscatune_engine", "Engines' counts, summed.", self._engine_counts, "count")

    def _engine_counts(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for model in self.context.models.all():
            if model.engine is not None:
                for name, value in vars(model.engine.stats()).items():
                    totals[name] = totals.get(name, 0.0) + value
        return totals


class _Server(uvicorn.Server):
    """Signals are the service's: one ends all servers. Who is in a handshake then is a stranger still."""

    def __init__(self, config: uvicorn.Config, handshakes: Handshakes | None = None) -> None:
        super().__init__(config)
        self._handshakes = handshakes

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._handshakes is not None:
            self._handshakes.close()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
    with listener:
        yield listener


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _signing_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(read_secret(path, "simulation key"), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read the simulation key {path}: make one by `obfuscatune keygen`") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds no Ed25519 key: make one by `obfuscatune keygen`")
    return key
