"""What a provider released, where, and on what evidence: a folder of files that he keeps, one for each release.

A file is a verification document with the grant beside it; it is written before the key goes out.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obfuscatune import documents
from obfuscatune.attest.record import MOST_BYTES, Verification
from obfuscatune.channel.grants import Grant
from obfuscatune.console.pages import text
from obfuscatune.errors import EvidenceError, IntegrityError, StorageError
from obfuscatune.protocol.files import write_new

VERSION = 1
MOST_SHOWN = 500
_NAME = re.compile(r"[0-9]{10,16}-[0-9a-f]{32}")


@dataclass(frozen=True)
class Release:
    """A key that went to an enclave. `record` is None where the file cannot be read any more."""

    id: str
    model: str
    manifest: str
    enclave: str
    enclave_key: str
    at: int
    owners: int
    until: str
    record: Verification | None

    @property
    def kinds(self) -> str:
        """Of the evidence."""
        return "" if self.record is None else ", ".join(part.kind for part in self.record.session.evidence.each)


class Releases:
    """The folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, grant: Grant, enclave: str, record: Verification) -> None:
        """Write down a release that is about to be made.

        Raises:
            StorageError: it cannot be written; then nothing is to be released.
        """
        document: dict[str, Any] = {
            "version": VERSION,
            "grant": {"id": grant.id, "model": grant.model, "manifest": grant.manifest},
            "terms": grant.terms.to_document(),
            "enclave": enclave,
            "verification": record.to_document(),
        }
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_new(self._folder / f"{grant.sequence}-{grant.id}.json", documents.canonical(document))
        except OSError as error:
            raise StorageError(text("error.no_release_kept", folder=self._folder, reason=error.strerror)) from error

    def all(self) -> list[Release]:
        """The releases, the newest first."""
        if not self._folder.is_dir():
            return []
        names = sorted((it.stem for it in self._folder.glob("*.json") if _NAME.fullmatch(it.stem)), reverse=True)
        return [self._read(name) for name in names[:MOST_SHOWN]]

    def document(self, release_id: str) -> bytes | None:
        """The verification document of a release, for `obfuscatune verify`; None where there is none of that id."""
        release = self._read(release_id) if _NAME.fullmatch(release_id) else None
        if release is None or release.record is None:
            return None
        return documents.canonical(release.record.to_document()) + b"\n"

    def _read(self, name: str) -> Release:
        at = int(name.partition("-")[0]) // 1000
        try:
            with (self._folder / f"{name}.json").open("rb") as file:
                document = documents.parse(file.read(MOST_BYTES + 1), most_bytes=MOST_BYTES)
            grant, terms = document["grant"], document["terms"]
            record = Verification.from_document(document["verification"])
            return Release(
                name,
                str(grant["model"]),
                str(grant["manifest"]),
                str(document["enclave"]),
                record.session.binding.attester.hex(),
                at,
                len(terms["owners"]),
                str(terms["until"]),
                record,
            )
        except (OSError, IntegrityError, EvidenceError, KeyError, TypeError):
            return Release(name, "", "", "", "", at, 0, "", None)
