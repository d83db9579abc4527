"""`obfuscatune verify`: evidence against a policy, line by line."""

import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obfuscatune.cli import output
from obfuscatune.cli.attested import collateral_cache
from obfuscatune.cli.options import AsJson
from obfuscatune.errors import ConfigError, VerificationFailed
from obfuscatune.option import Option

if TYPE_CHECKING:
    from obfuscatune.attest.checks import Check
    from obfuscatune.attest.policy import Policy
    from obfuscatune.attest.record import Session, Verification


def verify(
    file: Annotated[Path, typer.Argument(help="An evidence file, or a verification document.")],
    policy: Annotated[Path | None, Option("A policy (YAML).", unset="that of the verification document")] = None,
    now: Annotated[
        str | None,
        Option("At which time to verify: 2026-11-29T12:00:00Z, or Unix seconds.", unset="now; of a document, its own"),
    ] = None,
    collateral: Annotated[Path | None, Option("Folder of Intel's collateral, used in place of the attester's.")] = None,
    fetch_collateral: Annotated[
        str | None, Option("Fetch collateral that --collateral lacks: from intel, or a PCCS's https://...")
    ] = None,
    out: Annotated[Path | None, Option("Write a verification document, which can be checked again offline.")] = None,
    as_json: AsJson = False,
) -> None:
    """Verify evidence against a policy: every check, whether it holds or fails, and why.

    Takes an evidence file, or a verification document that --out wrote: that is verified again from its evidence, at
    its own time and by its own policy unless others are given. Exit code 0: all holds. 1: something fails.
    """
    from obfuscatune.attest.checks import readable_time
    from obfuscatune.attest.record import Session, examine, read_record, to_file_bytes

    record = read_record(file)
    session = record if isinstance(record, Session) else record.session
    when = _time(now, int(time.time()) if isinstance(record, Session) else record.time)
    cache = collateral_cache(collateral, fetch_collateral)
    if cache is not None:
        with output.progress("collateral"):
            session = replace(session, evidence=cache.complete(session.evidence, when))
    found = examine(session, _policy(record, policy), when)
    differs = not isinstance(record, Session) and record.repeat().checks != record.checks
    if out is not None:
        output.write_file(out, to_file_bytes(found))
    if as_json:
        output.write_json({**found.to_document(), "recorded_checks_differ": differs})
    else:
        show_checks(found.checks, simulated=found.simulated)
        whose = "the document's own policy" if policy is None else "the policy"
        output.write_text(f"at {readable_time(when)}, by {whose} {found.policy.digest}")
    if differs:
        raise VerificationFailed("the document's checks are not those that its evidence and policy give", found.checks)
    if not found.passed:
        failed = [check.name for check in found.checks if not check.passed]
        raise VerificationFailed(f"{len(failed)} of {len(found.checks)} checks fail: {', '.join(failed)}", found.checks)
    if not as_json:
        output.write_text(f"verified: {len(found.checks)} checks hold, until {readable_time(found.expires)}")


def show_checks(checks: "Iterable[Check]", *, simulated: bool) -> None:
    """Print each check, and loudly whether the evidence was simulated."""
    from obfuscatune.attest.simulated import WARNING

    if simulated:
        output.stderr().print(WARNING, style="bold red", soft_wrap=True)
    output.write_text("\n".join(map(str, checks)))
    if simulated:
        output.write_text(WARNING)


def _policy(record: "Session | Verification", path: Path | None) -> "Policy":
    from obfuscatune.attest.policy import Policy
    from obfuscatune.attest.record import Session

    if path is not None:
        return Policy.from_file(path)
    if isinstance(record, Session):
        raise ConfigError("an evidence file takes --policy: what is to be accepted")
    return record.policy


def _time(text: str | None, default: int) -> int:
    if text is None:
        return default
    if text.isascii() and text.isdigit() and len(text) <= 12:
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"--now is a time such as 2026-11-29T12:00:00Z, or Unix seconds, not {text!r:.80}") from error
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
