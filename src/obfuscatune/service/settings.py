"""The file `service.yaml`: everything that determines a service. Its digest is among the claims.

Whoever verifies the enclave verifies this file with it. So nothing here is read from the environment.
"""

import hashlib
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from obfuscatune.errors import ConfigError
from obfuscatune.fleet.fleet_file import Fleet, FleetDocument
from obfuscatune.fleet.members import Party
from obfuscatune.protocol.addresses import DeviceAddress, parse_worker_address
from obfuscatune.protocol.files import read_pem, read_trusted
from obfuscatune.protocol.tls import TlsConfig, pins
from obfuscatune.yaml_file import parse_mapping

MAX_BYTES = 2**20
"""Of the file."""
Positive = Annotated[int, Field(ge=1, le=10**12)]
Seconds = Annotated[int, Field(ge=1, le=7 * 86400)]
_HOST_PORT = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9.-]+)):(?P<port>\d{1,5})")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Address(_Strict):
    """Where something listens. Port 0 takes any that is free."""

    host: str
    port: Annotated[int, Field(ge=0, le=65535)]

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = _HOST_PORT.fullmatch(value)
        if match is None:
            raise ValueError("expected HOST:PORT, such as 0.0.0.0:8443 or [::1]:8443")
        return {"host": match["v6"] or match["host"], "port": int(match["port"])}

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Worker(_Strict):
    """A worker, and the certificate that it must show."""

    address: str
    """unix:PATH, tcp:HOST:PORT or device:cuda:N."""
    peer: str | None = None
    """A PEM file, or what it would hold; needed for a worker on another machine."""

    @field_validator("address")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            parse_worker_address(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value


class Tls(_Strict):
    """The enclave's identity towards workers, as `obfuscatune keygen` makes it."""

    certificate: Annotated[Path, Field(strict=False)]
    private_key: Annotated[Path, Field(strict=False)]


class Configfs(_Strict):
    """Evidence of TDX or SEV-SNP, from the kernel's configfs-tsm."""

    producer: Literal["configfs"]


class Tpm(_Strict):
    """A TPM 2.0 quote."""

    producer: Literal["tpm"]
    handle: str
    """Of the attestation key: "0x81010002"."""
    pcrs: Annotated[list[Annotated[int, Field(ge=0, le=23)]], Field(min_length=1)]
    """Which registers of SHA-256 are quoted."""
    tcti: str | None = None
    """How the TPM is reached; None is the tools' own default."""


class Simulated(_Strict):
    """Evidence that proves nothing, for development; refused unless a policy allows it."""

    producer: Literal["simulated"]
    key_file: Annotated[Path, Field(strict=False)]
    """An Ed25519 private key in PEM."""


class Limits(_Strict):
    """What one owner, and all together, may ask of a service."""

    requests_per_minute: Positive = 600
    """Of one owner."""
    tokens_per_minute: Positive = 200_000
    """Of one owner: those of prompts and those asked for."""
    concurrent_requests: Positive = 64
    """Completions of one owner that are under way."""
    connections: Positive = 512
    """Of all owners."""
    body_bytes: Positive = 4 * 2**20
    """Of a request, files excepted."""
    file_bytes: Positive = 100 * 2**20
    """Of one uploaded file."""
    stored_bytes: Positive = 2**30
    """Of all files of one owner."""
    files: Positive = 1000
    """Of one owner."""
    jobs_queued: Positive = 16
    """Of one owner: those that have not ended."""
    jobs_at_once: Positive = 1
    """Of all owners."""
    max_tokens: Positive = 4096
    """Of one completion."""
    choices: Positive = 8
    """The largest `n`."""
    batch_sequences: Positive = 32
    """Sequences that are decoded together."""
    cache_tokens: Positive = 65_536
    """Places for a token in the caches of one model: memory."""
    queue: Positive = 256
    """Completions that wait for a place in the batch."""
    adapters: Positive = 8
    """Fine-tuned models in memory; others are read again when they are asked for."""
    models: Positive = 4
    """Models in memory."""
    request_seconds: Seconds = 600
    """For one completion."""
    body_seconds: Seconds = 300
    """For receiving one request."""
    drain_seconds: Seconds = 30
    """For what is under way, when the service is told to end."""
    job_attempts: Positive = 20
    """How often a job is begun again after its worker failed."""


class Settings(_Strict):
    """The whole file."""

    listen: Address
    """OpenAI's API, over TLS."""
    channel: Address
    """The attested channel."""
    operator: Address | None = None
    """/healthz and /metrics, in plain HTTP: for this machine or an inner network."""
    state: Annotated[Path, Field(strict=False)]
    """The directory of all that is kept, sealed."""
    database: str | None = None
    """A URL of SQLAlchemy; None is a file of SQLite in the state directory."""
    worker: Worker | None = None
    mask_worker: Worker | None = None
    fleet: FleetDocument | None = None
    """Many workers in the place of one, or of two parties: what a fleet's file says."""
    enclave_device: str | None = None
    """Where the enclave's own part lies: cpu, or cuda:N, a confidential GPU."""
    tls: Tls | None = None
    profile: Literal["private", "guarded"] = "private"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    attestation: Annotated[Configfs | Tpm | Simulated, Field(discriminator="producer")]
    bundles: Annotated[list[str], Field(min_length=1)]
    """Where sealed models may lie: paths or URLs, which a grant's storage must be within."""
    providers: list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] | None = None
    """Ed25519 keys of the providers whose grants are taken; None takes any."""
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        masked = self.profile == "guarded"
        if (self.fleet is None) == (self.worker is None):
            raise ValueError("name a worker, or a fleet in its place")
        if self.fleet is not None and self.mask_worker is not None:
            raise ValueError("fleet names the workers of both parties: leave out mask_worker")
        if self.fleet is None and masked != (self.mask_worker is not None):
            raise ValueError(f"profile {self.profile} takes {'a mask_worker' if masked else 'no mask_worker'}")
        for worker in filter(None, (self.worker, self.mask_worker)):
            if (worker.peer is not None) and self.tls is None:
                raise ValueError("a worker's peer is given, but no tls: the enclave's certificate and key")
        if masked and all(any(_is_device(it) for it in self.addresses(party)) for party in get_args(Party)):
            raise ValueError(
                "worker and mask worker are both devices of this machine, in one hand, which sees through the masks: "
                "name a mask worker on another machine"
            )
        return self

    def addresses(self, party: Party) -> list[str]:
        """Of the workers of a party that are named; the mask party has none but under `guarded`."""
        if party == "mask" and self.profile != "guarded":
            return []
        if self.fleet is not None:
            return [it.address for it in self.fleet.members if it.party == party]
        worker = self.worker if party == "compute" else self.mask_worker
        return [] if worker is None else [worker.address]

    @property
    def database_url(self) -> str:
        """The URL of the database."""
        return self.database or f"sqlite:///{(self.state / 'state.sqlite').absolute()}"

    def with_certificates(self) -> "Settings":
        """The same with each worker's certificate in the place of its path: whoever can change files changes nothing.

        Raises:
            ConfigError: one cannot be read.
        """
        read: dict[str, Any] = {
            name: worker.model_copy(update={"peer": _pem(worker.peer).decode("ascii", "replace")})
            for name in ("worker", "mask_worker")
            if (worker := getattr(self, name)) is not None and worker.peer is not None
        }
        if self.fleet is not None:
            read["fleet"] = self.fleet.with_certificates(Path())
        return self.model_copy(update=read)

    @property
    def parties(self) -> "dict[Party, Worker | Fleet]":
        """Who multiplies, by party: the compute worker, or the fleet of them; under `guarded`, the mask worker too.

        Raises:
            ConfigError: the fleet cannot be used, or does not fit the profile.
        """
        if self.fleet is None:
            named: dict[Party, Worker | Fleet | None] = {"compute": self.worker, "mask": self.mask_worker}
            return {party: it for party, it in named.items() if it is not None}
        fleet = self.fleet.fleet(Path())
        wanted: tuple[Party, ...] = ("compute", "mask") if self.profile == "guarded" else ("compute",)
        return {party: fleet.only(party) for party in wanted}

    def tls_of(self, worker: "Worker | Fleet") -> TlsConfig | None:
        """How a worker, or a fleet, is reached; None without TLS.

        Raises:
            ConfigError: the worker's certificate cannot be read.
        """
        if self.tls is None:
            return None
        if isinstance(worker, Fleet):  # each member has its own certificate
            return TlsConfig(self.tls.certificate, self.tls.private_key, b"")
        if worker.peer is None:
            return None
        return TlsConfig(self.tls.certificate, self.tls.private_key, _pem(worker.peer))

    def trusted_keys(self, party: Party) -> tuple[str, ...]:
        """SHA-256 of the keys of a party's workers, or of the authorities that sign them, in order.

        Raises:
            ConfigError: a certificate cannot be read.
        """
        worker = self.parties.get(party)
        if isinstance(worker, Fleet):
            return worker.trusted_keys(party)
        tls = None if worker is None else self.tls_of(worker)
        return () if tls is None else tuple(sorted(pins(tls)))

    def may_hold(self, storage: str) -> bool:
        """Whether a bundle at `storage` lies within one of `bundles`."""
        if ".." in storage.replace("\\", "/").split("/") or "::" in storage:
            return False
        return any(storage == base or storage.startswith(base.rstrip("/") + "/") for base in self.bundles)


def _is_device(address: str) -> bool:
    return address.startswith(DeviceAddress.PREFIX)


def _pem(named: str) -> bytes:
    return read_pem(named, Path(), "worker's certificate")


def load_settings(path: Path) -> tuple[Settings, bytes]:
    """Read a file of settings.

    Returns:
        The settings, and the file's bytes, which are measured.

    Raises:
        ConfigError: it cannot be read; a key is unknown or given twice; a value is outside its range.
    """
    try:
        content = read_trusted(path, "configuration")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(content):,} bytes; at most {MAX_BYTES:,} are read")
    value = parse_mapping(content, path, "expected keys and values, such as `listen: 0.0.0.0:8443`")
    try:
        settings = Settings.model_validate(value).with_certificates()
        _check_fleet(settings)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return settings, content


def _check_fleet(settings: Settings) -> None:
    """See that a fleet can be used, and that claims name whomever it trusts.

    Raises:
        ConfigError: it does not fit the profile, lacks the enclave's own certificate, or has workers that show a
            certificate beside others that do not.
    """
    for party, fleet in settings.parties.items():
        if not isinstance(fleet, Fleet):
            continue
        shows = [it.certificate is not None for it in fleet.members]
        if fleet.discover is None and not any(shows):
            continue
        if settings.tls is None:
            raise ConfigError("fleet: its workers show certificates, but no tls is given: the enclave's own")
        if not all(shows):
            raise ConfigError(
                f"fleet: some {party} workers show a certificate and some do not, yet the claims would name the keys "
                "of the former alone: name a certificate for each"
            )


def configuration_digest(content: bytes) -> str:
    """SHA-256 of the file, in hex: the claim `configuration`."""
    return hashlib.sha256(content).hexdigest()


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        known = [
            name
            for kind in (Settings, FleetDocument, Limits, Worker, Tls, Simulated, Tpm)
            for name in kind.model_fields
        ]
        near = get_close_matches(key, known, n=1)
        return f"unknown key {where}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{where}: {message}"
