"""TRUSTED. Many workers that act as one.

In the order in which a request passes through:

    opening    a fleet's file or addresses -> a link to the workers of one party
    client     the link: store, submit, forget
    roster     the members: who can be asked, who is left and why
    holdings   who holds which shards, kept as `fleet.placement` has them while members come and go
    shards     a matrix in shards
    request    a product in parts -> put together; who sent a wrong one
    asking     whom to ask for a part, when another too, who is late too often
    link       one member: its thread, its jobs
    jobs       what a member is asked to do
    timing     how fast a member is
    keeper     looks after members that are silent or away
    stats      totals over all members
"""

from obfuscatune.enclave.fleet.client import FleetClient
from obfuscatune.enclave.fleet.opening import Worker, Workers, open_fleet, parties_of
from obfuscatune.enclave.fleet.stats import FleetStats

__all__ = ["FleetClient", "FleetStats", "Worker", "Workers", "open_fleet", "parties_of"]
