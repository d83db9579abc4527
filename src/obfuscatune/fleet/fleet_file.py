"""`fleet.yaml`: who is in a fleet, whom to trust with it, and how matrices are placed. Read strictly.

    members:
      - {address: "tcp:10.0.0.7:7600", certificate: a7.pem, operator: cloud-a, party: compute, memory: 40GiB}
    discover: http://10.0.0.2:7700/fleet.json
    operators:
      cloud-a: {party: compute, authority: cloud-a.pem}
      cloud-b: {party: mask, keys: [2f0c…]}
    placement: {replicas: 2, shard: auto, hedge: p99}

Paths are relative to the file; in the place of one, the certificate itself may stand. The file says whom to trust:
nobody else may be able to write it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from obfuscatune.errors import ConfigError, UntrustedPeer
from obfuscatune.fleet.discovery import split_url
from obfuscatune.fleet.listing import MAX_MEMBERS, check_operator
from obfuscatune.fleet.members import Member, Party
from obfuscatune.fleet.placement import ALL, Plan
from obfuscatune.fleet.policy import Operator, Policy, check_distinct, key_of, leaves_machine
from obfuscatune.option import parse_size
from obfuscatune.protocol.addresses import parse_worker_address
from obfuscatune.protocol.authority import load_authority
from obfuscatune.protocol.files import read_pem, read_trusted
from obfuscatune.yaml_file import parse_mapping

MAX_FILE_BYTES = 1 << 20
LOCAL = "not named"
"""The operator of workers that are named by their addresses alone."""
_MEMBERS, _AUTHORITYS = "worker's certificate", "authority's certificate"


@dataclass(frozen=True)
class Fleet:
    """Workers, and how matrices are placed on them: what `load` and `protect` take for `workers`."""

    members: tuple[Member, ...] = ()
    """Those that are named; those that are discovered come beside them."""
    policy: Policy = field(default_factory=Policy)
    plan: Plan = field(default_factory=Plan)
    hedge: bool = True
    """Whether a request that takes longer than the 99th percentile is sent to another replica too."""
    discover: str | None = None
    """Where a list of more members is."""
    wait_for: Mapping[Party, int] = field(default_factory=dict)
    """How many members of a party must be there before anything is sent to it: matrices are cut for those, once."""
    party: Party | None = None
    """The one party that is meant; see `only`."""

    def __post_init__(self) -> None:
        if not self.members and self.discover is None:
            raise ConfigError("a fleet has no members: name some, or where a list of them is (discover)")
        check_distinct(self.members)

    @property
    def parties(self) -> frozenset[Party]:
        """Those that have, or may have, members."""
        named = {member.party for member in self.members}
        return frozenset(named | (set(self.policy.parties.values()) if self.discover else set()))

    def of(self, party: Party) -> tuple[Member, ...]:
        """The members of a party that are named."""
        return tuple(member for member in self.members if member.party == party)

    def only(self, party: Party) -> Fleet:
        """One party of the fleet.

        Raises:
            ConfigError: it has no member, and none can be found.
        """
        if party not in self.parties:
            raise ConfigError(f"the fleet has no member of the {party} party")
        return replace(self, members=self.of(party), party=party)

    def trusted_keys(self, party: Party) -> tuple[str, ...]:
        """SHA-256, in hex, of the keys that a worker of that party shows, or that sign what it shows, in order.

        Whoever is asked anything shows one of them, but for members that are named without a certificate.
        """
        keys = self.policy.keys_of(party)
        if not self.policy.parties:
            keys = {key for it in self.of(party) if (key := key_of(it)) is not None}
        return tuple(sorted(keys))

    @classmethod
    def of_addresses(cls, addresses: Sequence[str], party: Party = "compute") -> Fleet:
        """A fleet of workers whose keys, if they are across a network, are pinned together by the TLS settings.

        Raises:
            ConfigError: an address cannot be used, or is there twice.
        """
        named = [str(parse_worker_address(address)) for address in addresses]
        return cls(tuple(Member(address, None, f"{LOCAL} ({party})", party) for address in named), party=party)

    @classmethod
    def read(cls, path: str | Path) -> Fleet:
        """The fleet that a file describes.

        Raises:
            ConfigError: it cannot be read, or says something that cannot be used; the message says what.
        """
        path = Path(path)
        try:
            content = read_trusted(path, "fleet file")
        except OSError as error:
            raise ConfigError(f"cannot read the fleet file {path}: {error.strerror}") from error
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: a fleet file has at most {MAX_FILE_BYTES:,} bytes")
        try:
            document = FleetDocument.model_validate(
                parse_mapping(content, path, "expected members, discover, operators, placement")
            )
            return document.fleet(path.parent)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"])
            raise ConfigError(f"{path}: {where}: {first['msg']}") from error
        except ConfigError as error:
            raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Text = Annotated[str, Field(min_length=1, max_length=4096)]
Certificate = Annotated[str, Field(min_length=1)]
"""A file, or what it would hold."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Member(_Strict):
    address: Text
    operator: Text
    party: Party
    certificate: Certificate | None = None
    memory: str | Annotated[int, Field(ge=1)] | None = None

    def member(self, folder: Path) -> Member:
        address = str(parse_worker_address(self.address))
        certificate = None if self.certificate is None else read_pem(self.certificate, folder, _MEMBERS)
        memory = parse_size(self.memory) if isinstance(self.memory, str) else self.memory
        return Member(address, certificate, check_operator(self.operator), self.party, memory)


class _Operator(_Strict):
    party: Party
    keys: Annotated[list[Digest], Field(min_length=1, max_length=MAX_MEMBERS)] | None = None
    authority: Certificate | None = None

    def operator(self, name: str, folder: Path) -> Operator:
        keys = self.keys or []
        if len(set(keys)) != len(keys):
            raise ConfigError(f"the operator {name} has one key twice")
        authority = None
        if self.authority is not None:
            authority = load_authority(read_pem(self.authority, folder, _AUTHORITYS))
        return Operator(check_operator(name), self.party, frozenset(keys), authority)


class _Placement(_Strict):
    replicas: Annotated[int, Field(ge=1, le=MAX_MEMBERS)] | Literal["all"] = 1
    shard: Literal["auto", "none"] = "auto"
    hedge: Literal["p99", "none"] = "p99"
    wait_for: dict[Party, Annotated[int, Field(ge=1, le=MAX_MEMBERS)]] = {}


class FleetDocument(_Strict):
    """What the file says; what stands under `fleet` in the settings of a service, too."""

    members: Annotated[list[_Member], Field(max_length=MAX_MEMBERS)] = []
    discover: Text | None = None
    operators: dict[str, _Operator] = {}
    placement: _Placement = _Placement()

    def fleet(self, folder: Path) -> Fleet:
        """The fleet; paths are relative to `folder`.

        Raises:
            ConfigError: it says something that cannot be used.
        """
        policy = Policy(it.operator(name, folder) for name, it in self.operators.items())
        members = tuple(it.member(folder) for it in self.members)
        if self.discover is not None:
            split_url(self.discover)
            if not self.operators:
                raise ConfigError("discover takes operators: without, anybody's worker would be accepted")
        for member in members:
            _admit(member, policy)
        replicas = ALL if self.placement.replicas == "all" else self.placement.replicas
        plan = Plan(replicas, self.placement.shard == "auto")
        return Fleet(
            members, policy, plan, self.placement.hedge == "p99", self.discover, wait_for=self.placement.wait_for
        )

    def with_certificates(self, folder: Path) -> FleetDocument:
        """The same with each certificate in the place of its path, so that no file can be changed afterwards.

        Raises:
            ConfigError: one cannot be read.
        """

        def read(named: str | None, what: str) -> str | None:
            return None if named is None else read_pem(named, folder, what).decode("ascii", "replace")

        members = [it.model_copy(update={"certificate": read(it.certificate, _MEMBERS)}) for it in self.members]
        operators = {
            name: it.model_copy(update={"authority": read(it.authority, _AUTHORITYS)})
            for name, it in self.operators.items()
        }
        return self.model_copy(update={"members": members, "operators": operators})


def _admit(member: Member, policy: Policy) -> None:
    """Hold a member that the file names against its own policy.

    One without a certificate must not be across a network. Where the file names no operators, its certificates are the
    pins.
    """
    if member.certificate is None:
        if leaves_machine(member):
            raise ConfigError(f"the member {member.address} leaves this machine: name its certificate")
        if policy.parties.get(member.operator, member.party) != member.party:
            raise ConfigError(f"the operator {member.operator} is not the {member.party} party")
        return
    if not policy.parties:
        return
    try:
        policy.check(member)
    except UntrustedPeer as error:
        raise ConfigError(f"the member {member.address} is refused by the file's own policy: {error}") from error
