"""`obfuscatune verify-receipt`."""

import datetime
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from obfuscatune.cli import output
from obfuscatune.cli.options import AsJson
from obfuscatune.errors import ConfigError, IntegrityError
from obfuscatune.option import Option


def verify_receipt(
    file: Annotated[Path, typer.Argument(help="The receipt, as /obfuscatune/v1/jobs/JOB/receipt gives it.")],
    policy: Annotated[Path | None, Option("A policy that the evidence in it must satisfy.")] = None,
    key: Annotated[str | None, Option("Or the service's signing key in hex, where its evidence was verified.")] = None,
    adapter: Annotated[Path | None, Option("A folder with the adapter that it must be of.")] = None,
    now: Annotated[int | None, Option("Verify as of this time, in Unix seconds.", unset="now")] = None,
    as_json: AsJson = False,
) -> None:
    """Verify the receipt of a job of fine-tuning: who signed it, where that ran, and that its parts belong together."""
    from obfuscatune import documents
    from obfuscatune.attest.policy import Policy
    from obfuscatune.service.receipt import file_digests
    from obfuscatune.service.receipt import verify_receipt as verify

    try:
        signed = documents.read(file)
        accepted = None if policy is None else Policy.from_file(policy)
        verified = verify(signed, key=key, policy=accepted, now=int(time.time()) if now is None else now)
        if adapter is not None:
            names = sorted(verified.document["adapter"])
            if file_digests({name: (adapter / name).read_bytes() for name in names}) != verified.document["adapter"]:
                raise IntegrityError(f"{adapter} is not the adapter of this receipt")
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if as_json:
        checks = [] if verified.verified is None else [vars(it) for it in verified.verified.checks]
        output.write_json({"receipt": dict(verified.document), "checks": checks})
        return
    _show(verified.document)
    if verified.verified is None:
        output.notice("signed by that key; where it ran was not checked: --policy does")
    elif verified.verified.simulated:
        output.notice("SIMULATED: the evidence proves nothing")


def _show(document: Any) -> None:
    def moment(seconds: int) -> str:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")

    products, masks = document["products"], document["masks"]
    lines = {
        "job": document["job"],
        "owner": document["owner"],
        "model": f"{document['model']['name']} (manifest {document['model']['manifest']})",
        "data": document["data"]["training"],
        "adapter": ", ".join(f"{name} {digest}" for name, digest in document["adapter"].items()),
        "recipe": ", ".join(f"{name}={value}" for name, value in document["recipe"].items()),
        "profile": document["profile"],
        "products": f"{products['requests']:,} by workers, {products['verified']:,} of them verified",
        "masks": "none" if masks is None else ", ".join(f"{name}={value}" for name, value in masks.items()),
        "steps": f"{document['steps']}, {document['tokens']:,} tokens; losses {document['losses']}",
        "time": f"{moment(document['began'])} to {moment(document['ended'])}",
    }
    output.write_text(output.labelled(lines))
