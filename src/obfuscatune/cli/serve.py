"""`obfuscatune serve`."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import yaml

from obfuscatune.cli import output
from obfuscatune.cli.options import AsJson
from obfuscatune.option import Option

if TYPE_CHECKING:
    from obfuscatune.service.server import Listening
    from obfuscatune.service.settings import Settings


def serve(
    config: Annotated[Path, Option("The service's YAML file: docs/service.md.")],
    check: Annotated[bool, Option("Check file, workers and evidence, print the claims for a policy, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the enclave: OpenAI's API on sealed models, for owners and providers who verify it first.

    Keys come through the attested channel and are gone when this process ends; what lies on its disk is sealed.
    SIGTERM ends it in good order: answers are finished, jobs write a checkpoint.
    """
    from obfuscatune.channel.measure import measure_process
    from obfuscatune.service.settings import load_settings

    settings, content = load_settings(config)
    measured = measure_process(content)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("uvicorn", "httpx", "asyncio", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from obfuscatune.service.server import Service, policy_of_claims

    if check:
        with output.progress("checking"):
            _check(settings)
        arguments = tuple(it for it in measured.arguments if it != "--check")
        claims = {"claims": policy_of_claims(settings, measured._replace(arguments=arguments))}
        output.write_result(claims, yaml.safe_dump(claims, sort_keys=False, width=4096).rstrip(), as_json=as_json)
        output.notice(f"{config}: can be served; above, what a policy accepts that accepts this service alone")
        return

    def told(where: "Listening") -> None:
        if as_json:
            output.write_json(
                {"api": where.api, "channel": where.channel, "operator": where.operator, "console": where.console}
            )
            sys.stdout.flush()  # whoever waits for it reads a pipe
        else:
            output.notice(f"attested channel at {where.channel}, API at https://{where.api}")
            if where.console is not None:
                output.notice(f"the operator's console, by a link for one use: {where.console}")

    with output.progress("starting"):
        service = Service(settings, measured, output.notice)
    service.run(told)


def _check(settings: "Settings") -> None:
    from obfuscatune.service.opening import open_links, own_device
    from obfuscatune.service.server import make_producer

    make_producer(settings).attest(bytes(64))
    own_device(settings)
    with open_links(settings, output.notice):
        pass
