"""Decides what grants, consents and revocations allow, in their order. Without disk, network and clock."""

import datetime
import threading
from collections.abc import Mapping
from typing import NamedTuple

from obfuscatune import documents
from obfuscatune.channel.grants import Consent, Grant, Revocation
from obfuscatune.errors import TermsError

MOST_MODELS = 1024
"""Of all providers together, those that were revoked among them."""
MOST_CONSENTS = 16384
MOST_ASKED, MOST_ASKED_SHOWN = 16, 256
"""Consents that one owner waits for, of one model: the oldest goes first; and how many of all owners are told of."""


class Latest(NamedTuple):
    """The newest word of a provider on a model."""

    sequence: int
    digest: str
    """Of the signed document: the same one may come again after a restart, another one of that number may not."""


class GrantRegistry:
    """What is granted now. Any thread may ask.

    Args:
        latest: by provider's key and model, from before a restart: what a log kept.
    """

    def __init__(self, latest: Mapping[tuple[str, str], Latest] | None = None) -> None:
        self._latest = dict(latest or {})
        self._grants: dict[str, Grant] = {}
        self._consents: dict[tuple[str, str, str], Consent] = {}
        self._asked: dict[tuple[str, str, str], None] = {}
        self._lock = threading.Lock()

    @property
    def latest(self) -> dict[tuple[str, str], Latest]:
        """For the log."""
        with self._lock:
            return dict(self._latest)

    @property
    def grants(self) -> tuple[Grant, ...]:
        """All that stand, expired ones too."""
        with self._lock:
            return tuple(self._grants.values())

    def grant(self, grant: Grant, now: datetime.datetime) -> None:
        """Let a grant stand, in the place of an older one for the same model.

        Raises:
            TermsError: it is older than the newest word, over already, or the name is another provider's.
        """
        with self._lock:
            self._check_provider(grant.model, grant.provider)
            if now >= grant.terms.until:
                raise TermsError("until: the grant is over already")
            self._check_order(grant)
            older = self._grants.get(grant.model)
            self._grants[grant.model] = grant
            if older is not None and older.manifest != grant.manifest:
                self._forget_consents(grant.model)

    def forget(self, grant: Grant) -> None:
        """Let a grant stand no more: its key does not open the bundle, say. Its sequence stays taken."""
        with self._lock:
            if self._grants.get(grant.model) is grant:
                del self._grants[grant.model]

    def revoke(self, revocation: Revocation) -> Grant | None:
        """Take back what was granted for a model; returns the grant that stood.

        Raises:
            TermsError: nothing was granted, it is older than the newest word, or the model is another provider's.
        """
        with self._lock:
            self._check_provider(revocation.model, revocation.provider)
            if (revocation.provider, revocation.model) not in self._latest:
                raise TermsError(f"model: nothing was granted for {revocation.model!r}")
            self._check_order(revocation)
            self._forget_consents(revocation.model)
            return self._grants.pop(revocation.model, None)

    def consent(self, consent: Consent) -> None:
        """Let an adapter go to its owner.

        Raises:
            TermsError: as `check_consent`.
        """
        with self._lock:
            self._check_consent(consent)
            self._consents[consent.model, consent.owner, consent.adapter] = consent
            self._asked.pop((consent.model, consent.owner, consent.adapter), None)

    def check_consent(self, consent: Consent) -> bool:
        """See whether a consent can be taken; whether it is a new one.

        Raises:
            TermsError: no grant for the very model stands that leaves it to the provider.
        """
        with self._lock:
            self._check_consent(consent)
            return (consent.model, consent.owner, consent.adapter) not in self._consents

    def consents(self, model: str) -> int:
        """How many count for a model."""
        with self._lock:
            return sum(key[0] == model for key in self._consents)

    def ask_consent(self, model: str, owner: str, adapter: str) -> bool:
        """Note that an owner wants an adapter out, where the provider wants to be asked. Returns whether it was."""
        with self._lock:
            grant = self._grants.get(model)
            if grant is None or owner not in grant.terms.owners or grant.terms.export != "provider-consent":
                return False
            if (model, owner, adapter) in self._consents:
                return False
            self._asked.setdefault((model, owner, adapter))
            own = [key for key in self._asked if key[0] == model and key[1] == owner]
            for key in own[: max(0, len(own) - MOST_ASKED)]:
                del self._asked[key]
            return True

    def asked(self, model: str) -> list[dict[str, str]]:
        """The consents that owners of the grant wait for, the oldest first."""
        with self._lock:
            terms = self._grants[model].terms if model in self._grants else None
            owners = terms.owners if terms is not None and terms.export == "provider-consent" else ()
            waiting = [(owner, it) for name, owner, it in self._asked if name == model and owner in owners]
        return [{"owner": owner, "adapter": it} for owner, it in waiting[:MOST_ASKED_SHOWN]]

    def consents_to(self, model: str, owner: str) -> list[str]:
        """The adapters that may go to an owner by consent."""
        with self._lock:
            return [it for name, whose, it in self._consents if (name, whose) == (model, owner)]

    def check(
        self, model: str, owner: str, use: str, now: datetime.datetime, tokens_used: int, tokens_wanted: int = 1
    ) -> Grant:
        """The grant that allows it, as `Terms.check` decides.

        Raises:
            TermsError: none does.
        """
        with self._lock:
            grant = self._find(model)
        grant.terms.check(owner, use, now, tokens_used, tokens_wanted)
        return grant

    def check_export(self, model: str, owner: str, adapter: str, now: datetime.datetime) -> Grant:
        """The grant by which an adapter may leave the enclave.

        Raises:
            TermsError: it may not.
        """
        with self._lock:
            grant = self._find(model)
            consented = (model, owner, adapter) in self._consents
        grant.terms.check_owner(owner, now)
        if grant.terms.export == "never":
            raise TermsError("export: the provider lets no adapter leave the enclave")
        if grant.terms.export == "provider-consent" and not consented:
            raise TermsError(f"export: the provider has not consented to {adapter}")
        return grant

    def _check_consent(self, consent: Consent) -> None:
        grant = self._find(consent.model)
        self._check_provider(consent.model, consent.provider)
        if grant.manifest != consent.manifest:
            raise TermsError("manifest: the consent is for another bundle than the grant")
        if consent.owner not in grant.terms.owners:
            raise TermsError("owners: the grant does not name the owner of the consent")
        if grant.terms.export != "provider-consent":
            raise TermsError(f"export: the grant says {grant.terms.export}, and asks for no consent")
        if len(self._consents) >= MOST_CONSENTS:
            raise TermsError(f"{MOST_CONSENTS:,} consents are kept, and there are as many")

    def _find(self, model: str) -> Grant:
        if model not in self._grants:
            raise TermsError(f"model: nothing is granted for {model!r:.80}")
        return self._grants[model]

    def _check_provider(self, model: str, provider: str) -> None:
        if model in self._grants and self._grants[model].provider != provider:
            raise TermsError("model: another provider granted a model of this name")

    def _check_order(self, document: Grant | Revocation) -> None:
        digest = documents.digest(dict(document.signed))
        newest = self._latest.get((document.provider, document.model))
        if newest is not None and document.sequence < newest.sequence:
            raise TermsError(f"sequence: {document.sequence} is older than {newest.sequence}, which was heard")
        if newest is not None and document.sequence == newest.sequence and digest != newest.digest:
            raise TermsError(f"sequence: {document.sequence} was another document's")
        if newest is None and len(self._latest) >= MOST_MODELS:
            raise TermsError(f"{MOST_MODELS:,} models are kept, and there are as many")
        self._latest[document.provider, document.model] = Latest(document.sequence, digest)

    def _forget_consents(self, model: str) -> None:
        self._consents = {key: it for key, it in self._consents.items() if key[0] != model}
        self._asked = {key: it for key, it in self._asked.items() if key[0] != model}
