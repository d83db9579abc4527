"""How a model is to be protected: the options of every command that has one, and what they come to."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from obfuscatune.cli import options
from obfuscatune.cli.options import ENVIRONMENT, PROTECTION
from obfuscatune.errors import ConfigError
from obfuscatune.option import Option

if TYPE_CHECKING:
    from obfuscatune.enclave.profiles import Profile
    from obfuscatune.enclave.protection import Masking
    from obfuscatune.fleet.fleet_file import Fleet
    from obfuscatune.protocol.tls import TlsConfig


@dataclass(frozen=True)
class Protection:
    """How a model is to be protected, if it is; each field is an option."""

    plain: Annotated[bool, Option("Run unprotected, for comparison.", PROTECTION)] = False
    worker: Annotated[
        str | None,
        Option(
            "Address of a running worker: unix:PATH or tcp:HOST:PORT; or a GPU of this machine: device:cuda:N.",
            PROTECTION,
            unset="starts one on this machine",
            variable=ENVIRONMENT["worker"],
        ),
    ] = None
    fleet: Annotated[
        Path | None,
        Option(
            "File that names many workers, which act as one: fleet.yaml (docs/fleet.md).",
            PROTECTION,
            variable=ENVIRONMENT["fleet"],
        ),
    ] = None
    profile: options.Profile = None
    base: options.Base = None
    public_base: options.PublicBase = False
    first_blocks: options.FirstBlocks = None
    key_file: Annotated[
        Path | None,
        Option(
            "Root key of the transforms, made if missing.",
            PROTECTION,
            unset="a fresh key, then forgotten",
            variable=ENVIRONMENT["key_file"],
        ),
    ] = None
    tls_cert: options.TlsCert = None
    tls_key: options.TlsKey = None
    peer: Annotated[
        Path | None, Option("The certificate the worker must show.", PROTECTION, variable=ENVIRONMENT["peer"])
    ] = None
    mask_worker: Annotated[
        str | None,
        Option(
            "Under --profile guarded, the address of the worker that multiplies the masks. It must be in another hand.",
            PROTECTION,
            unset="starts one on this machine too",
            variable=ENVIRONMENT["mask_worker"],
        ),
    ] = None
    mask_peer: options.MaskPeer = None
    mask_memory: Annotated[
        str | None, Option("For masks that are drawn ahead, as 512MiB; 0 draws none.", PROTECTION, unset="1GiB")
    ] = None
    mask_budget: Annotated[
        float | None,
        Option(
            "The largest advantage in telling two inputs apart that the worker may ever have.",
            PROTECTION,
            unset="0.01",
        ),
    ] = None

    enclave_device: Annotated[
        str | None,
        Option("Where the enclave's own part lies: cpu, or cuda:N, a confidential GPU.", PROTECTION, unset="cpu"),
    ] = None

    def __post_init__(self) -> None:
        if self.base not in (None, "closed", "public"):
            raise ConfigError(f"--base: expected closed or public, found {self.base}")
        if self.public_base and self.base == "closed":
            raise ConfigError("--public-base says that the weights are published, --base closed that they are not")
        if self.fleet is not None:
            self._settle_fleet()
        if self.mask_budget is not None and not 0 < self.mask_budget < 1:
            raise ConfigError(f"--mask-budget: expected an advantage above 0 and below 1, found {self.mask_budget:g}")

    def _settle_fleet(self) -> None:
        """See that a fleet stands alone; what is named on the command line wins over the environment.

        Raises:
            ConfigError: a worker is named beside it.
        """
        for name in ("worker", "peer", "mask_worker", "mask_peer"):
            value = getattr(self, name)
            if value is None:
                continue
            if options.is_from_environment(name, value):
                object.__setattr__(self, name, None)
            elif options.is_from_environment("fleet", self.fleet):
                object.__setattr__(self, "fleet", None)
                return
            else:
                option = name.replace("_", "-")
                raise ConfigError(f"--fleet names all workers and their certificates: leave out --{option}")

    @property
    def tls(self) -> "TlsConfig | None":
        """Our identity, and the worker's certificate."""
        from obfuscatune.protocol.tls import TlsConfig

        if self.fleet is not None and self.tls_cert is not None and self.tls_key is not None:
            return TlsConfig(self.tls_cert, self.tls_key, b"")  # each member of a fleet has its own
        if self.peer is None and self.mask_peer is not None:  # the worker is on this host, the mask worker is not
            return None
        return TlsConfig.from_options(self.tls_cert, self.tls_key, self.peer)

    @property
    def masking(self) -> "Masking":
        """What the options say of masks.

        Raises:
            ConfigError: a size that cannot be read, or the mask worker's certificate without ours.
        """
        from obfuscatune.enclave.protection import DEFAULT_MASKING, Masking
        from obfuscatune.option import parse_size
        from obfuscatune.protocol.tls import TlsConfig

        tls = None
        if self.mask_peer is not None:
            if self.tls_cert is None or self.tls_key is None:
                raise ConfigError("--mask-peer takes --tls-cert and --tls-key beside it")
            tls = TlsConfig(self.tls_cert, self.tls_key, self.mask_peer)
        memory = DEFAULT_MASKING.memory_bytes if self.mask_memory is None else parse_size(self.mask_memory)
        return Masking(tls, memory, self.mask_budget or DEFAULT_MASKING.budget)

    @property
    def named_workers(self) -> str | None:
        """What was named: an address, or a fleet's file; None where a worker is started."""
        return self.worker if self.fleet is None else str(self.fleet)

    @property
    def workers(self) -> "str | Fleet | None":
        """The worker's address, or the fleet.

        Raises:
            ConfigError: the fleet's file cannot be used.
        """
        if self.fleet is None:
            return self.worker
        from obfuscatune.fleet.fleet_file import Fleet

        return Fleet.read(self.fleet)

    @property
    def names_two_devices(self) -> bool:
        """Whether both workers are devices of this machine."""
        from obfuscatune.enclave.placement import device_of

        return None not in (device_of(self.worker), device_of(self.mask_worker))

    def unless_plain(self) -> "Protection | None":
        """None where a run is to be plain.

        Raises:
            ConfigError: it is to be plain, yet an option says how to protect it; the environment may.
        """
        if not self.plain:
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "plain"}
        given = [
            name
            for name, value in values.items()
            if value is not None and value is not False and not options.is_from_environment(name, value)
        ]
        if given:
            raise ConfigError(f"--plain protects nothing: leave it out, or --{given[0].replace('_', '-')}")
        return None


def resolved_profile(protection: Protection) -> "Profile":
    """The profile that is asked for, with its knobs.

    Raises:
        ConfigError: there is none of that name, or a knob cannot be used.
    """
    from obfuscatune.enclave.profiles import resolve

    knobs: dict[str, Any] = {} if protection.first_blocks is None else {"first_blocks": protection.first_blocks}
    if protection.public_base:
        knobs["public_base"] = True
    return resolve(protection.profile or "private", **knobs)
