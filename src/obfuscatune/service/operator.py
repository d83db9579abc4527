"""What the operator's console shows of a service: sums, read when it asks. Of whom and of what, it has nothing."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from obfuscatune.console.operator import Snapshot, WorkerLoad
from obfuscatune.protocol.limits import VERSION
from obfuscatune.version import __version__

if TYPE_CHECKING:
    from obfuscatune.enclave.client import ClientStats, WorkerLink
    from obfuscatune.fleet.members import Party
    from obfuscatune.service.api.context import Context


def looker(context: Context) -> Callable[[], Snapshot]:
    """What reads the service."""
    started = time.time()

    def look() -> Snapshot:
        settings, limits = context.settings, context.settings.limits
        engines = [it.engine.stats() for it in context.models.all() if it.engine is not None]
        disk = shutil.disk_usage(settings.state)
        return Snapshot(
            versions={
                "ObfuscaTune": __version__,
                "PyTorch": version("torch"),
                "Python": platform.python_version(),
                "wire": str(VERSION),
            },
            profile=settings.profile,
            started=started,
            workers=_workers(context),
            models={name: int(count) for name, count in context.models.states().items()},
            jobs={name: int(count) for name, count in context.state.job_states().items()},
            jobs_at_once=limits.jobs_at_once,
            job_products=context.jobs.products(),
            answering=sum(it.running for it in engines),
            waiting=sum(it.queued for it in engines),
            queue=limits.queue,
            tokens=sum(it.prompt_tokens + it.completion_tokens for it in engines),
            disk_total=disk.total,
            disk_free=disk.free,
        )

    return look


def _workers(context: Context) -> tuple[WorkerLoad, ...]:
    """Each worker that is named or was found, with what all models had of it."""
    protections = [it.protection for it in context.models.all() if it.protection is not None]
    clients: dict[Party, list[WorkerLink]] = {
        "compute": [it.client for it in protections],
        "mask": [it.masks.client for it in protections if it.masks is not None],
    }
    loads = []
    for party, links in clients.items():
        named = context.settings.addresses(party)
        stats: dict[str, list[ClientStats]] = {address: [] for address in named}
        for link in links:
            for address, found in _stats_of(link, named):
                stats.setdefault(address, []).append(found)
        loads += [
            WorkerLoad(
                party,
                address,
                products=sum(it.crossings for it in each),
                sent=sum(it.bytes_sent for it in each),
                received=sum(it.bytes_received for it in each),
                seconds_waiting=sum(it.seconds_waiting for it in each),
                reconnects=sum(it.reconnects for it in each),
                retries=sum(it.retries for it in each),
            )
            for address, each in stats.items()
        ]
    return tuple(loads)


def _stats_of(link: WorkerLink, named: list[str]) -> list[tuple[str, ClientStats]]:
    """Of the one worker that is named, or of each of a fleet."""
    from obfuscatune.enclave.fleet import FleetClient

    if isinstance(link, FleetClient):
        return [(it.name, it.worker.stats) for it in link.links if it.worker is not None]
    return [(named[0], link.stats)]
