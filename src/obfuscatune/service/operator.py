"""What the operator's console shows of a service: sums, read when it asks. Of whom and of what, it has nothing."""

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
    from obfuscatune.service.api.context import Context


def looker(context: "Context") -> Callable[[], Snapshot]:
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


def _workers(context: "Context") -> tuple[WorkerLoad, ...]:
    settings = context.settings
    protections = [it.protection for it in context.models.all() if it.protection is not None]
    parties = [("compute", settings.worker, [it.stats for it in protections])]
    if settings.mask_worker is not None:
        masks = [it.masks.client.stats for it in protections if it.masks is not None]
        parties.append(("mask", settings.mask_worker, masks))
    return tuple(
        WorkerLoad(
            role,
            worker.address,
            products=sum(it.crossings for it in stats),
            sent=sum(it.bytes_sent for it in stats),
            received=sum(it.bytes_received for it in stats),
            seconds_waiting=sum(it.seconds_waiting for it in stats),
            reconnects=sum(it.reconnects for it in stats),
            retries=sum(it.retries for it in stats),
        )
        for role, worker, stats in parties
    )
