"""`obfuscatune verify-log`."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obfuscatune.cli import output
from obfuscatune.cli.options import AsJson
from obfuscatune.errors import ConfigError, IntegrityError
from obfuscatune.option import Option

if TYPE_CHECKING:
    from obfuscatune.channel.audit_chain import Head


def verify_log(
    file: Annotated[
        Path, typer.Argument(help="A copy of a service's audit log, as /obfuscatune/v1/audit-log gives it.")
    ],
    key: Annotated[str, Option("The service's signing key in hex, as its verified claims name it.")],
    since: Annotated[
        Path | None, Option("An earlier copy, or a head that `owner` keeps: this copy must go on from it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify an audit log: no entry was changed, left out or taken back, and the service signed its end.

    Entries of other parties are in it as digests alone.
    """
    from obfuscatune.channel.audit_chain import verify_copy

    keys = frozenset({key.lower()})
    try:
        earlier = None if since is None else last_head(since)
        with file.open("rb") as opened:
            head, clear = verify_copy(opened, keys, earlier)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from error
    when = datetime.datetime.fromtimestamp(head.at, datetime.UTC).isoformat(timespec="seconds")
    text = f"{head.count} entries, {clear} of them in clear; signed at {when}\nchain {head.chain.hex()}"
    output.write_result({**head.to_document(), "clear": clear}, text, as_json=as_json)


def last_head(path: Path) -> "Head":
    """The head that an earlier copy ends with. Its signature is not checked: it is compared, not trusted.

    Raises:
        IntegrityError: it has none.
    """
    from obfuscatune.channel.audit_chain import MOST_LINE_BYTES, Head
    from obfuscatune.documents import parse

    last = b""
    with path.open("rb") as file:
        while line := file.readline(MOST_LINE_BYTES + 1):
            last = line
    head = parse(last, most_bytes=MOST_LINE_BYTES).get("head")
    if not isinstance(head, dict):
        raise IntegrityError(f"{path}: ends without a head")
    return Head.from_document(head.get("document"))
