"""Who may be a member: a policy on operators' keys. It decides from bytes alone, and connects to nobody.

An *operator* controls workers, and is one party: compute or mask, never both. A member is accepted if the key of its
certificate is pinned for its operator, or if its operator's authority signed the certificate. Whatever else a list says
of a member (its operator's name, its memory) is a claim: a wrong one can slow the work down and shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from obfuscatune.errors import ConfigError, UntrustedPeer
from obfuscatune.fleet.members import Member, Party
from obfuscatune.protocol.addresses import TcpAddress, parse_worker_address
from obfuscatune.protocol.authority import check_issued, load_one
from obfuscatune.protocol.certificates import key_digest


@dataclass(frozen=True)
class Operator:
    """One who controls workers."""

    name: str
    party: Party
    keys: frozenset[str] = frozenset()
    """SHA-256 of the public keys (SubjectPublicKeyInfo) of its workers, in hex."""
    authority: x509.Certificate | None = None
    """Signs the certificates of its workers."""

    @property
    def trusted_keys(self) -> frozenset[str]:
        """Those of its workers that are pinned, and that of its authority."""
        return self.keys if self.authority is None else self.keys | {key_digest(self.authority).hex()}


class Policy:
    """Accepts members, or says why not."""

    def __init__(self, operators: Iterable[Operator] = ()) -> None:
        """
        Raises:
            ConfigError: an operator is there twice or could have no worker, or one key belongs to two.
        """
        self._operators: dict[str, Operator] = {}
        owner: dict[str, str] = {}
        for operator in operators:
            if operator.name in self._operators:
                raise ConfigError(f"the operator {operator.name} is there twice")
            if not operator.keys and operator.authority is None:
                raise ConfigError(f"the operator {operator.name} has neither keys nor an authority: it has no worker")
            for key in operator.trusted_keys:
                if key in owner:
                    raise ConfigError(
                        f"the operators {owner[key]} and {operator.name} have the key {key[:16]} in common: whoever "
                        "has it is both; have each make its own"
                    )
                owner[key] = operator.name
            self._operators[operator.name] = operator

    @property
    def parties(self) -> dict[str, Party]:
        """The party of each operator, by name."""
        return {name: operator.party for name, operator in self._operators.items()}

    def keys_of(self, party: Party) -> set[str]:
        """SHA-256 of what is accepted of a party: workers' own keys, and those of the authorities that sign others."""
        keys: set[str] = set()
        for operator in self._operators.values():
            if operator.party == party:
                keys |= operator.trusted_keys
        return keys

    def check(self, member: Member) -> None:
        """Return where a member may be used.

        Raises:
            UntrustedPeer: it may not; the message says why.
        """
        operator = self._operators.get(member.operator)
        if operator is None:
            raise UntrustedPeer(f"no operator {member.operator} is named by the policy")
        if operator.party != member.party:
            raise UntrustedPeer(f"the operator {operator.name} is the {operator.party} party, never the {member.party}")
        try:
            certificate = load_one(member.certificate or b"")
            digest = key_digest(certificate).hex()
        except (ValueError, UnsupportedAlgorithm):
            raise UntrustedPeer("its certificate cannot be read") from None
        if digest in operator.keys:
            return
        if operator.authority is None:
            raise UntrustedPeer(f"its key {digest[:16]} is not pinned for the operator {operator.name}")
        if digest == key_digest(operator.authority).hex():
            raise UntrustedPeer("it shows the certificate of the authority itself")
        check_issued(certificate, operator.authority)


def check_distinct(members: Iterable[Member]) -> None:
    """Check that no two members share an address or a key, and no operator is both parties.

    Raises:
        ConfigError: they do, or a certificate cannot be read.
    """
    seen: dict[str, str] = {}
    parties: dict[str, Party] = {}
    for member in members:
        names = [member.address] if (key := key_of(member)) is None else [member.address, key]
        for name in names:
            if name in seen:
                what = "address" if name == member.address else "key"
                raise ConfigError(
                    f"the fleet's members {seen[name]} and {member.address} have one {what}: leave one out"
                )
            seen[name] = member.address
        if parties.setdefault(member.operator, member.party) != member.party:
            raise ConfigError(
                f"the operator {member.operator} has workers of both parties: whoever holds both sees through the masks"
            )


def key_of(member: Member) -> str | None:
    """SHA-256 of the public key of a member, in hex; None for one without a certificate.

    Raises:
        ConfigError: its certificate cannot be read.
    """
    if member.certificate is None:
        return None
    try:
        return key_digest(load_one(member.certificate)).hex()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"the certificate of the fleet's member {member.address} cannot be read: {error}") from error


def leaves_machine(member: Member) -> bool:
    """Whether what is said to a member passes a network."""
    address = parse_worker_address(member.address)
    return isinstance(address, TcpAddress) and not address.is_loopback
