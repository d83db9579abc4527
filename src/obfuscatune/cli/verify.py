"""`obfuscatune verify`: evidence against a policy, line by line."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obfuscatune.cli import output
from obfuscatune.cli.options import AsJson
from obfuscatune.errors import ConfigError, VerificationFailed
from obfuscatune.option import Option
from obfuscatune.protocol.files import write_new

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
    from obfuscatune.attest.record import Session, examine, read_record

    record = read_record(file)
    session = record if isinstance(record, Session) else record.session
    when = _time(now, int(time.time()) if isinstance(record, Session) else record.time)
    session = _with_collateral(session, collateral, fetch_collateral, when)
    found = examine(session, _policy(record, policy), when)
    differs = not isinstance(record, Session) and record.repeat().checks != record.checks
    if out is not None:
        _write(out, found)
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


def _with_collateral(session: "Session", folder: Path | None, source: str | None, now: int) -> "Session":
    from dataclasses import replace

    from obfuscatune.attest.collateral import INTEL_PCS, CollateralCache, fetch_from

    if folder is None:
        if source is not None:
            raise ConfigError("--fetch-collateral takes --collateral: the folder that it is kept in")
        return session
    if source is not None and source != "intel" and not source.startswith("https://"):
        raise ConfigError(f"--fetch-collateral is intel, or the https:// address of a PCCS, not {source!r:.80}")
    fetch = None if source is None else fetch_from(INTEL_PCS if source == "intel" else source)
    with output.progress("collateral"):
        return replace(session, evidence=CollateralCache(folder, fetch).complete(session.evidence, now))


def _write(path: Path, found: "Verification") -> None:
    from obfuscatune.attest.record import to_file_bytes

    try:
        write_new(path, to_file_bytes(found), 0o644)
    except FileExistsError:
        raise ConfigError(f"{path} exists and is not overwritten: choose another name, or remove it") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


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
