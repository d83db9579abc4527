"""What the attested channel brings: grants and their keys, owners' keys, consents, revocations.

Each is checked, noted in the audit log, and only then counts.
"""

import contextlib
import datetime
import hashlib
import re
from typing import TYPE_CHECKING, Any

from obfuscatune.channel.grants import Consent, Grant, Revocation
from obfuscatune.errors import IntegrityError, TermsError
from obfuscatune.secret_memory import SecretBytes
from obfuscatune.service import tables as rows
from obfuscatune.service.api.tls import HttpsIdentity
from obfuscatune.service.keys import KEY_BYTES, Owner
from obfuscatune.service.provider_words import GRANTED, REVOKED, log_details

if TYPE_CHECKING:
    from obfuscatune.service.api.context import Context


class ServiceHandler:
    """The channel's `Handler`. Its methods are called by several threads."""

    def __init__(self, context: "Context", https: HttpsIdentity, api_address: str) -> None:
        self._context, self._https, self._api_address = context, https, api_address

    def granted(self, peer: str, grant: Grant, key: bytes) -> dict[str, Any]:
        """See `channel.server.Handler`."""
        context = self._context
        providers = context.settings.providers
        if providers is not None and grant.provider not in providers:
            raise TermsError("provider: this service takes grants of other providers alone")
        secret = _secret(key)
        with context.wording:
            bundle = context.models.open(grant, secret)
            registry = context.access.registry
            registry.grant(grant, datetime.datetime.now(datetime.UTC))
            try:
                consents = context.words.granted(grant, secret)
                asked = context.words.asked_before(grant, secret)
                about = {**log_details(grant), "grant": grant.id, "terms": grant.terms.to_document()}
                context.log.append(peer, GRANTED, about)
            except BaseException:
                registry.forget(grant)  # what is not on disk does not count
                raise
            for consent in consents:
                with contextlib.suppress(TermsError):  # the new terms may ask for none, or name its owner no more
                    registry.consent(consent)
            for owner, adapter in asked:
                registry.ask_consent(grant.model, owner, adapter)
            context.models.granted(grant, secret, bundle)
        context.jobs.wake()
        return {"model": grant.model, "grant": grant.id, **self._common()}

    def owner_key(self, peer: str, certificate: bytes, key: bytes) -> dict[str, Any]:
        """See `channel.server.Handler`."""
        context = self._context
        if not any(peer in grant.terms.owners for grant in context.access.registry.grants):
            raise TermsError("owner: no grant names this key")
        owner = Owner(peer, certificate, _secret(key))
        try:
            context.state.owner_seen(owner)
        except IntegrityError:
            owner.key.close()
            raise IntegrityError(
                "owner-key: what this owner has here is sealed under another key than this one"
            ) from None
        self._https.admit(certificate)
        context.log.append(peer, "owner-key-released")
        context.owners.put(owner)
        context.jobs.wake()
        return {"owner": peer, **self._common()}

    def revoke(self, peer: str, revocation: Revocation) -> dict[str, Any]:
        """See `channel.server.Handler`."""
        context = self._context
        with context.wording:
            context.access.registry.revoke(revocation)
            context.models.revoke(revocation.model)  # before the disk, which may refuse
            context.words.revoked(revocation)
            context.log.append(peer, REVOKED, log_details(revocation))
        context.jobs.wake()
        return {"model": revocation.model, **self._common()}

    def consent(self, peer: str, consent: Consent) -> dict[str, Any]:
        """See `channel.server.Handler`."""
        context = self._context
        registry = context.access.registry
        # Its name has a part that the owner chose, and the log is in clear: the random part names it.
        about = {"owner": consent.owner, "model": consent.model, "adapter": adapter_id(consent.adapter)}
        with context.wording:
            is_new = registry.check_consent(consent)
            model = context.models.get(consent.model)
            if model is None:
                raise TermsError(f"model: nothing is granted for {consent.model!r}")
            if is_new:
                context.words.consented(consent, model.key.secret)
            context.log.append(peer, "consented", about)
            registry.consent(consent)
        return {"adapter": consent.adapter, **self._common()}

    def status(self, peer: str) -> dict[str, Any]:
        """See `channel.server.Handler`."""
        context = self._context
        models = []
        for model in context.models.all():
            grant = model.grant
            is_providers = _signed_by(grant, peer)
            if not is_providers and peer not in grant.terms.owners:
                continue
            about: dict[str, Any] = {"model": grant.model, "grant": grant.id, "manifest": grant.manifest}
            about |= {
                "status": model.status,
                "terms": grant.terms.to_document(),
                "tokens_used": context.state.tokens_used(grant.id),
            }
            if is_providers:
                registry = context.access.registry
                asked = {"consents": registry.consents(grant.model), "asked": registry.asked(grant.model)}
                about |= {"reason": model.reason, **asked}
            models.append(about)
        jobs: list[dict[str, Any]] = []
        owner = context.owners.get(peer)
        if owner is not None:
            page = context.state.page(rows.jobs, owner, limit=100)
            jobs = [{"job": row.id, "status": row.clear["status"]} for row in page.rows]
        return {"models": models, "jobs": jobs, "owner_key": owner is not None, **self._common()}

    def _common(self) -> dict[str, Any]:
        return {"api": self._api_address, "head": self._context.log.head()}


def adapter_id(name: str) -> str:
    """The random part of a fine-tuned model's name; of what is none, a digest."""
    parts = name.split(":")
    is_name = len(parts) == 5 and re.fullmatch(r"[0-9a-f]{24}", parts[4]) is not None
    return parts[4] if is_name else hashlib.sha256(name.encode()).hexdigest()


def _secret(key: bytes) -> SecretBytes:
    if len(key) != KEY_BYTES:
        raise IntegrityError(f"a released key has {KEY_BYTES} bytes, not {len(key)}")
    return SecretBytes(key)


def _signed_by(grant: Grant, peer: str) -> bool:
    from obfuscatune.channel.identity import signer_fingerprint

    return signer_fingerprint(grant.provider) == peer
