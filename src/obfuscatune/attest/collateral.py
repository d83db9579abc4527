"""Intel's collateral for TDX and SGX quotes: fetched, kept in a folder, fetched anew before it grows old.

A verifier that fetches it itself does not depend on what the attester sends, which may be up to a month old.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from obfuscatune.attest.dcap import parse_quote
from obfuscatune.attest.evidence import Evidence
from obfuscatune.documents import canonical, read
from obfuscatune.errors import ConfigError, EvidenceError, IntegrityError
from obfuscatune.protocol.files import write_over

INTEL_PCS = "https://api.trustedservices.intel.com"
REFRESH_SECONDS = 24 * 3600
MOST_BYTES = 512 * 1024
"""Of the collateral of one platform, which takes 20 KB."""
Fetch = Callable[[bytes], Mapping[str, str]]
"""From a quote to its collateral; raises EvidenceError."""
_NAME = re.compile(r"[A-Za-z0-9]{1,32}\Z")


def fetch_from(url: str = INTEL_PCS) -> Fetch:
    """A function that fetches collateral from Intel's PCS, or from a PCCS at this address."""

    def fetch(quote: bytes) -> Mapping[str, str]:
        import dcap_qvl  # type: ignore[import-untyped]  # no py.typed

        try:
            found: dict[str, str] = json.loads(asyncio.run(dcap_qvl.get_collateral(url, quote)).to_json())
        except (ValueError, RuntimeError) as error:
            raise EvidenceError(f"no collateral from {url}: {error}") from error
        return {name: value for name, value in found.items() if value is not None}

    return fetch


class CollateralCache:
    """A folder of collateral, one file a kind of platform.

    Args:
        directory: Made if it is missing.
        fetch: Where collateral comes from that is not there, or older than `refresh_seconds`; None is nowhere.
        refresh_seconds: When what is there is fetched anew. While that fails, it serves until it expires.
    """

    def __init__(self, directory: Path, fetch: Fetch | None = None, refresh_seconds: int = REFRESH_SECONDS) -> None:
        self._directory, self._fetch, self._refresh_seconds = directory, fetch, refresh_seconds

    def complete(self, evidence: Evidence, now: int) -> Evidence:
        """The evidence, with collateral of this cache in place of the attester's wherever there is some.

        Raises:
            EvidenceError: a quote cannot be read.
            ConfigError: the folder cannot be written to.
        """
        first, *others = (self._complete(part, now) for part in evidence.each)
        return replace(first, parts=tuple(others))

    def _complete(self, part: Evidence, now: int) -> Evidence:
        part = replace(part, parts=())
        if part.kind not in ("tdx", "sgx"):
            return part
        found = self._find(part, now)
        return part if found is None else replace(part, collateral=found)

    def _find(self, part: Evidence, now: int) -> dict[str, str] | None:
        path = self._path(part)
        kept = _read(path)
        if kept is not None and now - kept["fetched"] < self._refresh_seconds and _is_current(kept, now):
            return dict(kept["collateral"])
        if self._fetch is not None:
            try:
                fetched = dict(self._fetch(part.quote))
            except EvidenceError:
                if kept is None or not _is_current(kept, now):
                    raise
            else:
                self._write(path, {"fetched": now, "collateral": fetched})
                return fetched
        return dict(kept["collateral"]) if kept is not None else None

    def _path(self, part: Evidence) -> Path:
        parsed = parse_quote(part.quote, part.kind)
        try:
            names = (parsed.fmspc(), parsed.ca())
        except ValueError as error:
            raise EvidenceError(f"{part.kind}: {error}") from error
        if not all(_NAME.match(name) for name in names):
            raise EvidenceError(f"{part.kind}: the quote's platform cannot be told")
        return self._directory / f"{part.kind}-{names[0]}-{names[1]}.json"

    def _write(self, path: Path, document: Mapping[str, Any]) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_over(path, canonical(dict(document)), 0o644)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot keep collateral in {self._directory}: {error}") from error


def _read(path: Path) -> dict[str, Any] | None:
    """What is kept; None where nothing is, or nothing of use: then it is fetched anew."""
    try:
        document = read(path, most_bytes=MOST_BYTES)
    except (OSError, IntegrityError):
        return None
    collateral = document.get("collateral")
    if type(document.get("fetched")) is not int or not isinstance(collateral, dict):
        return None
    return document if all(isinstance(value, str) for value in collateral.values()) else None


def _is_current(kept: Mapping[str, Any], now: int) -> bool:
    """Whether it is not from the future, and Intel has not set its end before now. The verifier decides, not this."""
    try:
        ends = [json.loads(kept["collateral"][name])["nextUpdate"] for name in ("tcb_info", "qe_identity")]
        return bool(kept["fetched"] <= now <= min(datetime.fromisoformat(end).timestamp() for end in ends))
    except (KeyError, TypeError, ValueError):
        return False
