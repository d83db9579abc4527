"""`obfuscatune serve`."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from obfuscatune.cli import output
from obfuscatune.cli.options import AsJson
from obfuscatune.option import Option

if TYPE_CHECKING:
    from obfuscatune.service.server import Listening
    from obfuscatune.service.settings import Settings


def serve(
    config: Annotated[Path, Option("The service's YAML file: docs/service.md.")],
    check: Annotated[bool, Option("Read the file, connect to the workers, have evidence made, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the enclave: OpenAI's API on sealed models, for owners and providers who verify it first.

    Keys come through the attested channel and are gone when this process ends; what lies on its disk is sealed.
    SIGTERM ends it in good order: answers are finished, jobs write a checkpoint.
    """
    from obfuscatune.channel.measure import measure_process
    from obfuscatune.service.settings import load_settings

    settings, content = load_settings(config)
    measured = measure_process(content, environment=_environment())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("uvicorn", "httpx", "asyncio", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from obfuscatune.service.server import Service

    if check:
        _check(settings)
        output.notice(f"{config}: can be served")
        return

    def told(where: "Listening") -> None:
        if as_json:
            output.write_json({"api": where.api, "channel": where.channel, "operator": where.operator})
            sys.stdout.flush()  # whoever waits for it reads a pipe
        else:
            output.notice(f"attested channel at {where.channel}, API at https://{where.api}")

    with output.progress("starting"):
        service = Service(settings, measured)
    service.run(told)


def _environment() -> Mapping[str, str]:
    """The environment that this process was started with; by now we have set variables of our own for libraries."""
    try:
        pairs = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return dict(os.environ)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in (it.partition(b"=") for it in pairs) if name}


def _check(settings: "Settings") -> None:
    from obfuscatune.enclave.client import WorkerClient
    from obfuscatune.service.server import make_producer

    make_producer(settings).attest(bytes(64))
    for worker in (settings.worker, settings.mask_worker):
        if worker is not None:
            WorkerClient.open(worker.address, tls=settings.tls_of(worker)).close()
