"""From a fleet, as its file or a list of addresses has it, to a link."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

from obfuscatune.enclave.client import RetryPolicy, WorkerLink, open_link
from obfuscatune.enclave.fleet.client import FleetClient
from obfuscatune.enclave.fleet.keeper import PROBE_SECONDS
from obfuscatune.errors import ConfigError
from obfuscatune.fleet.discovery import Discovery
from obfuscatune.fleet.fleet_file import Fleet
from obfuscatune.fleet.members import Member, Party
from obfuscatune.fleet.policy import check_distinct
from obfuscatune.protocol.addresses import DeviceAddress, TcpAddress, parse_worker_address
from obfuscatune.protocol.tls import TlsConfig

log = logging.getLogger(__name__)

_MEMBER = RetryPolicy(attempts=2, patience_s=0.3)
"""Of one member: others are asked meanwhile, and it is tried again later."""
_PROBE = RetryPolicy(attempts=1, patience_s=0.0)


def open_fleet(
    fleet: Fleet,
    *,
    tls: TlsConfig | None = None,
    deadline_s: float = 120.0,
    patience_s: float = RetryPolicy.patience_s,
    notice: Callable[[str], None] = log.warning,
) -> FleetClient:
    """A link to the workers of one party, connected.

    Args:
        fleet: of one party (`Fleet.only`).
        tls: our certificate and key. A member's own certificate is what it must show; `peers` are the certificates of
            those that are named by their address alone.
        deadline_s: seconds within which a worker must answer a request.
        patience_s: how long a request waits while no worker holds what it needs.
        notice: is told, in one line, what befalls members.

    Raises:
        ConfigError: a member's address cannot be used, or there is none of that party.
        DiscoveryError: there is no list of members that can be used.
        WireError: no member answers.
    """
    if fleet.party is None:
        raise ConfigError("a fleet is opened for one party at a time: fleet.only('compute')")
    party, named = fleet.party, fleet.members
    for member in named:
        _tls_of(member, tls)
    discovery: Discovery | None = None
    found: tuple[Member, ...] = ()
    if fleet.discover is not None:
        discovery = Discovery(fleet.discover, fleet.policy.check, say=notice, changed=lambda listed: changed(listed))
        found = discovery.members
    members = {member.address: member for member in (*(it for it in found if it.party == party), *named)}
    if not members:
        raise ConfigError(f"the fleet has no member of the {party} party")

    def connect(member: Member) -> WorkerLink:
        return open_link(member.address, tls=_tls_of(member, tls), deadline_s=deadline_s, retry=_MEMBER)

    def probe(member: Member) -> None:
        if not member.address.startswith(DeviceAddress.PREFIX):
            open_link(member.address, tls=_tls_of(member, tls), deadline_s=PROBE_SECONDS, retry=_PROBE).close()

    client = FleetClient(
        members.values(), connect, probe, plan=fleet.plan, notice=notice, hedge=fleet.hedge, patience_s=patience_s
    )
    reference, fixed = weakref.ref(client), frozenset(member.address for member in named)

    def changed(listed: tuple[Member, ...]) -> None:
        if (present := reference()) is not None:
            present.update([it for it in listed if it.party == party], fixed)

    try:
        if discovery is not None:
            discovery.start()
            client.own(discovery.close)
        client.open(fleet.wait_for.get(party, 1))
    except BaseException:
        client.close()
        raise
    return client


Worker = str | WorkerLink | Fleet | None
Workers = Worker | Sequence[str]
"""What `load` and `protect` take: an address, several, a fleet, or an open link. None starts a worker."""


def parties_of(workers: Workers, mask_worker: Workers, *, masks: bool) -> tuple[Worker, Worker]:
    """The compute worker, or the fleet of them, and the same for masks; nothing is connected.

    Args:
        workers, mask_worker: as `load` takes them. A fleet of both parties is named once.
        masks: whether the profile has any.

    Raises:
        ConfigError: a member is there twice, or a party has none.
    """
    compute, mask = _as_one(workers, "compute"), _as_one(mask_worker, "mask")
    if isinstance(workers, Fleet) and masks and mask is None:
        mask = workers.only("mask")
    named = [it for one in (compute, mask) for it in (one.members if isinstance(one, Fleet) else ())]
    check_distinct(named)
    for one, other in ((compute, mask), (mask, compute)):
        if not isinstance(one, Fleet) or not isinstance(other, str):
            continue
        if str(parse_worker_address(other)) in {it.address for it in one.members}:
            raise ConfigError(f"{other} is of both parties: whoever holds both sees through the masks; name two")
    return compute, mask


def _as_one(workers: Workers, party: Party) -> Worker:
    if isinstance(workers, Fleet):
        return workers.only(party)
    if workers is None or isinstance(workers, str | WorkerLink):
        return workers
    if not workers or not all(isinstance(it, str) for it in workers):
        raise ConfigError("several workers are named by a list of their addresses; or by a fleet, Fleet.read(...)")
    return workers[0] if len(workers) == 1 else Fleet.of_addresses(workers, party)


def _tls_of(member: Member, tls: TlsConfig | None) -> TlsConfig | None:
    """How a member is spoken to.

    Raises:
        ConfigError: it takes a certificate of ours, and there is none.
    """
    address = parse_worker_address(member.address)
    if not isinstance(address, TcpAddress):
        return None
    if member.certificate is None:
        return tls if tls is not None and tls.peers else None
    if tls is None:
        raise ConfigError(
            f"{member.address} is spoken to by TLS: name this enclave's own certificate and key, by --tls-cert and "
            "--tls-key (tls= in Python)"
        )
    return replace(tls, peers=member.certificate)
