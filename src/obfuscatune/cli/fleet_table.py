"""Where a fleet's workers would hold a model's matrices: what `inspect --fleet` adds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obfuscatune.cli.output import notice

if TYPE_CHECKING:
    from rich.table import Table

    from obfuscatune.enclave.plan import Plan
    from obfuscatune.fleet.fleet_file import Fleet
    from obfuscatune.fleet.members import Member, Party
    from obfuscatune.fleet.placement import Shard


def placed_document(plan: Plan, path: Path) -> dict[str, Any]:
    """The placement of a model on a fleet, by party. Nothing is connected but a list that is to be discovered.

    Speeds are not measured: workers are taken for equally fast.

    Raises:
        ConfigError: the fleet's file cannot be used, or a party is missing.
        DiscoveryError: its list cannot be had.
        QuotaExceeded: the workers named have no room for the model.
    """
    from obfuscatune.fleet.fleet_file import Fleet
    from obfuscatune.fleet.placement import MatrixSize, Seat, place

    fleet = Fleet.read(path)
    members = _members(fleet)
    sizes = [
        MatrixSize(f"{layer.name}" + (f"[{index}]" if layer.count > 1 else ""), layer.p, layer.q, plan.dtype.itemsize)
        for layer in plan.layers
        if layer.place == "worker"
        for index in range(layer.count)
    ]
    parties: tuple[Party, ...] = ("compute", "mask") if plan.profile.masks else ("compute",)
    document: dict[str, Any] = {}
    for party in parties:
        own = [it for it in members if it.party == party] or list(fleet.only(party).members)
        shards = place(sizes, [Seat(it.address, it.memory) for it in own], fleet.plan)
        of = {size.name: size for size in sizes}
        held: Counter[str] = Counter()
        for shard in shards:
            for name in shard.holders:
                held[name] += shard.columns * of[shard.matrix].column_bytes
        document[party] = {
            "workers": [
                {"address": it.address, "operator": it.operator, "memory": it.memory, "bytes": held[it.address]}
                for it in own
            ],
            "shards": [_shard_document(shard) for shard in shards],
        }
    return document


def placed_table(party: str, document: dict[str, Any]) -> Table:
    """What each worker of a party would hold."""
    from obfuscatune.report.page import format_bytes
    from obfuscatune.report.terminal import plain_table

    table = plain_table(f"{party} worker", "operator", numbers=("shards", "would hold", "memory"))
    counts = Counter(name for shard in document["shards"] for name in shard["holders"])
    for it in document["workers"]:
        memory = "" if it["memory"] is None else format_bytes(it["memory"])
        table.add_row(it["address"], it["operator"], str(counts[it["address"]]), format_bytes(it["bytes"]), memory)
    return table


def _members(fleet: Fleet) -> list[Member]:
    """Those that are named, and those that are listed now."""
    from obfuscatune.fleet.discovery import Discovery

    if fleet.discover is None:
        return list(fleet.members)
    found = Discovery(fleet.discover, fleet.policy.check, say=notice).members
    return list({it.address: it for it in (*found, *fleet.members)}.values())


def _shard_document(shard: Shard) -> dict[str, Any]:
    return {"layer": shard.matrix, "columns": [shard.first, shard.last], "holders": list(shard.holders)}
