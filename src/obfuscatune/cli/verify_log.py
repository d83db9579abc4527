"""`obfuscatune verify-log`."""

import datetime
from pathlib import Path
from typing import Annotated

import typer

from obfuscatune.cli import output
from obfuscatune.cli.options import AsJson
from obfuscatune.errors import ConfigError
from obfuscatune.option import Option


def verify_log(
    file: Annotated[
        Path, typer.Argument(help="A copy of a service's audit log, as /obfuscatune/v1/audit-log gives it.")
    ],
    key: Annotated[str, Option("The service's signing key in hex, as its verified claims name it.")],
    since: Annotated[Path | None, Option("An earlier copy, which this one must go on from.")] = None,
    as_json: AsJson = False,
) -> None:
    """Verify an audit log: no entry was changed, left out or taken back, and the service signed its end.

    Entries of other parties are in it as digests alone.
    """
    from obfuscatune.service.audit_log import verify_copy

    keys = frozenset({key.lower()})
    try:
        earlier = None
        if since is not None:
            earlier = last_head(since)
        with file.open("rb") as opened:
            head = verify_copy(opened, keys, earlier)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if as_json:
        output.write_json(head)
        return
    when = datetime.datetime.fromtimestamp(head["at"], datetime.UTC).isoformat(timespec="seconds")
    output.write_text(f"{head['count']} entries, {head['clear']} of them in clear; signed at {when}")
    output.write_text(f"chain {head['chain']}")


def last_head(path: Path) -> dict[str, object]:
    """The document within the head of an earlier copy. Its signature is not checked: it is compared, not trusted.

    Raises:
        IntegrityError: it has none.
    """
    from obfuscatune.documents import parse
    from obfuscatune.errors import IntegrityError
    from obfuscatune.service.audit_log import MOST_LINE_BYTES

    last = b""
    with path.open("rb") as file:
        while line := file.readline(MOST_LINE_BYTES + 1):
            last = line
    head = parse(last, most_bytes=MOST_LINE_BYTES).get("head")
    document = head.get("document") if isinstance(head, dict) else None
    if not isinstance(document, dict) or not isinstance(document.get("count"), int) or "chain" not in document:
        raise IntegrityError(f"{path}: ends without a head")
    return document
