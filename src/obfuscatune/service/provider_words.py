"""What providers said and are to answer, over restarts: grants, revocations, consents, and requests for these.

    grants       the newest word on each model            in clear, and in the audit log
    revocations  signed, the newest on each model         in clear, and in the audit log
    consents     signed, with the sequence they came at   sealed under the model's key, which comes with a grant
    asked        the consents that owners wait for        sealed under the model's key

Database and log lie on a disk of somebody else's: the newer of the two counts, and signatures are verified again. Who
sets back both is found out by whoever keeps the log's head. A consent counts again with the next grant of its bundle,
unless a revocation came after it: the sequence at which it came is sealed with it. Requests that are put back allow
nothing: their provider is asked once more.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import delete, insert, select, update

from obfuscatune import documents
from obfuscatune.channel.grants import MOST_TOKENS, Consent, Grant, Revocation
from obfuscatune.channel.registry import GrantRegistry, Latest
from obfuscatune.errors import IntegrityError
from obfuscatune.sealing.blobs import open_blob, seal_blob
from obfuscatune.secret_memory import SecretBytes
from obfuscatune.service.audit_log import AuditLog
from obfuscatune.service.state import State, new_id, padded
from obfuscatune.service.tables import asked, consents, grants, revocations

log = logging.getLogger(__name__)
GRANTED, REVOKED = "granted", "revoked"
_CONSENT, _ASKED = "consent", "asked"
_Name = tuple[str, str]
"""A provider's key and a model."""


class ProviderWords:
    """Keeps what providers said, and gives it back to a service that was restarted. One thread at a time."""

    def __init__(self, state: State, audit: AuditLog) -> None:
        """Read what was kept.

        Raises:
            IntegrityError: it is not what was kept.
            StorageError: the database refused.
        """
        self._state = state
        self._latest, self._revoked = _of_log(audit)
        with state.reading() as connection:
            for it in connection.execute(select(grants)):
                _raise_to(self._latest, (it.provider, it.model), Latest(it.sequence, it.digest))
            for it in connection.execute(select(revocations)):
                word = Revocation.from_signed(documents.parse(bytes(it.signed)))
                if (word.provider, word.model, word.sequence) != (it.provider, it.model, it.sequence):
                    raise IntegrityError("the database has a revocation in the place of another")
                self._note(word)

    def registry(self) -> GrantRegistry:
        """What decides, with nothing granted yet and nothing forgotten."""
        return GrantRegistry(self._latest)

    def granted(self, grant: Grant, key: SecretBytes) -> tuple[Consent, ...]:
        """Keep a grant's place in the order.

        Args:
            key: of its bundle.

        Returns:
            The consents that were given for that very bundle and not revoked since.

        Raises:
            StorageError: the database refused.
        """
        name = grant.provider, grant.model
        with self._state.writing() as connection:
            self._keep_latest(connection, grant)
            mine = consents.c.provider == grant.provider, consents.c.model == grant.model
            connection.execute(delete(consents).where(*mine, consents.c.manifest != grant.manifest))
            connection.execute(delete(asked).where(*_asked_of(grant), asked.c.manifest != grant.manifest))
            found = connection.execute(select(consents.c.id, consents.c.details).where(*mine)).all()
        _raise_to(self._latest, name, _latest_of(grant))
        return tuple(self._opened(grant, key, found))

    def revoked(self, word: Revocation) -> None:
        """Keep a revocation, and nothing of what was consented to before.

        Raises:
            StorageError: the database refused.
        """
        self._note(word)
        mine = revocations.c.provider == word.provider, revocations.c.model == word.model
        values = {"sequence": word.sequence, "signed": documents.canonical(dict(word.signed))}
        with self._state.writing() as connection:
            self._keep_latest(connection, word)
            if not connection.execute(update(revocations).where(*mine).values(values)).rowcount:
                connection.execute(insert(revocations).values(provider=word.provider, model=word.model, **values))
            gone = consents.c.provider == word.provider, consents.c.model == word.model
            connection.execute(delete(consents).where(*gone))
            connection.execute(delete(asked).where(*_asked_of(word)))

    def consented(self, consent: Consent, key: SecretBytes) -> None:
        """Keep a consent.

        Args:
            key: of its bundle.

        Raises:
            StorageError: the database refused.
        """
        row_id, sequence = new_id("consent-"), self._latest[consent.provider, consent.model].sequence
        content = documents.canonical({"sequence": sequence, "signed": dict(consent.signed)})
        values = {"provider": consent.provider, "model": consent.model, "manifest": consent.manifest}
        details = seal_blob(key, padded(content), purpose=_CONSENT, name=row_id)
        with self._state.writing() as connection:
            connection.execute(insert(consents).values(id=row_id, details=details, **values))

    def keep_asked(self, grant: Grant, key: SecretBytes, waiting: Sequence[Mapping[str, str]]) -> None:
        """Keep all that owners wait for of a grant's bundle, in the place of what was kept.

        Args:
            key: of its bundle.
            waiting: as `GrantRegistry.asked` tells it.

        Raises:
            StorageError: the database refused.
        """
        content = padded(documents.canonical({"asked": [dict(it) for it in waiting]}))
        details = seal_blob(key, content, purpose=_ASKED, name=_asked_name(grant))
        with self._state.writing() as connection:
            connection.execute(delete(asked).where(*_asked_of(grant)))
            values = {"provider": grant.provider, "model": grant.model, "manifest": grant.manifest}
            connection.execute(insert(asked).values(details=details, **values))

    def asked_before(self, grant: Grant, key: SecretBytes) -> list[tuple[str, str]]:
        """(owner, adapter) of what owners wait for, as it was kept for a grant's very bundle.

        Raises:
            StorageError: the database refused.
        """
        with self._state.reading() as connection:
            found = connection.scalar(select(asked.c.details).where(*_asked_of(grant)))
        if found is None:
            return []
        try:
            kept = documents.parse(open_blob(key, bytes(found), purpose=_ASKED, name=_asked_name(grant)))
            return [(str(it["owner"]), str(it["adapter"])) for it in kept["asked"]]
        except (IntegrityError, KeyError, TypeError):
            log.warning("model %s: requests for consent were changed on the disk, and do not count", grant.model)
            return []

    def _opened(self, grant: Grant, key: SecretBytes, found: Any) -> Iterator[Consent]:
        revoked = self._revoked.get((grant.provider, grant.model), -1)
        for row_id, details in found:
            try:
                kept = documents.parse(open_blob(key, bytes(details), purpose=_CONSENT, name=row_id))
                if set(kept) != {"sequence", "signed"} or type(kept["sequence"]) is not int:
                    raise IntegrityError("no consent that was kept")
                consent = Consent.from_signed(kept["signed"])
            except IntegrityError:
                log.warning("model %s: a consent was changed on the disk, and does not count", grant.model)
                continue
            is_its = (consent.provider, consent.model, consent.manifest) == (
                grant.provider,
                grant.model,
                grant.manifest,
            )
            if is_its and kept["sequence"] > revoked:
                yield consent

    def _keep_latest(self, connection: Any, word: Grant | Revocation) -> None:
        named = grants.c.provider == word.provider, grants.c.model == word.model
        values = _latest_of(word)._asdict()
        known = connection.scalar(select(grants.c.sequence).where(*named))
        if known is None:
            connection.execute(insert(grants).values(provider=word.provider, model=word.model, **values))
        elif known < word.sequence:
            connection.execute(update(grants).where(*named).values(values))

    def _note(self, word: Revocation) -> None:
        name = word.provider, word.model
        _raise_to(self._latest, name, _latest_of(word))
        self._revoked[name] = max(self._revoked.get(name, -1), word.sequence)


def _asked_of(word: Grant | Revocation) -> tuple[Any, ...]:
    return asked.c.provider == word.provider, asked.c.model == word.model


def _asked_name(grant: Grant) -> str:
    return f"{grant.provider}/{grant.model}/{grant.manifest}"


def log_details(word: Grant | Revocation) -> dict[str, Any]:
    """What the audit log has of a word, from which its place in the order can be told again."""
    return {
        "model": word.model,
        "manifest": word.manifest,
        "provider": word.provider,
        "sequence": word.sequence,
        "document": documents.digest(dict(word.signed)),
    }


def _of_log(audit: AuditLog) -> tuple[dict[_Name, Latest], dict[_Name, int]]:
    """The newest word, and the newest revocation, on each model."""
    latest: dict[_Name, Latest] = {}
    revoked: dict[_Name, int] = {}
    for entry in audit.entries(GRANTED, REVOKED):
        about: Mapping[str, Any] = entry["details"]
        if "sequence" not in about:
            continue  # of before 2026-11-29
        texts, sequence = [about.get(it) for it in ("provider", "model", "document")], about["sequence"]
        if (
            not all(isinstance(it, str) for it in texts)
            or type(sequence) is not int
            or not 0 <= sequence <= MOST_TOKENS
        ):
            raise IntegrityError(f"entry {entry['n']} of the audit log is of no grant")
        provider, model, digest = map(str, texts)
        _raise_to(latest, (provider, model), Latest(sequence, digest))
        if entry["what"] == REVOKED:
            revoked[provider, model] = max(revoked.get((provider, model), -1), sequence)
    return latest, revoked


def _latest_of(word: Grant | Revocation) -> Latest:
    return Latest(word.sequence, documents.digest(dict(word.signed)))


def _raise_to(latest: dict[_Name, Latest], name: _Name, found: Latest) -> None:
    if name not in latest or latest[name].sequence < found.sequence:
        latest[name] = found
