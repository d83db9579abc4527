"""What an owner may do with which model now: grants, their terms, and the tokens that were used under them."""

import datetime
import threading
from dataclasses import dataclass

from obfuscatune.channel.grants import Grant
from obfuscatune.channel.registry import GrantRegistry
from obfuscatune.errors import TermsError
from obfuscatune.service.state import State

INFERENCE, FINE_TUNING = "inference", "fine-tuning"


@dataclass(frozen=True)
class Reservation:
    """Tokens that a request may use at most; `settle` gives back what it did not."""

    grant: str
    tokens: int


class Access:
    """Decides by the registry of grants and by what is used, which the state keeps. Safe from any thread."""

    def __init__(self, registry: GrantRegistry, state: State) -> None:
        self.registry = registry
        self._state = state
        self._lock = threading.Lock()

    def granted_to(self, owner: str) -> tuple[Grant, ...]:
        """The grants that name an owner, and whose time is not over."""
        now = _now()
        return tuple(it for it in self.registry.grants if owner in it.terms.owners and now < it.terms.until)

    def find(self, model: str, owner: str) -> Grant | None:
        """The grant for a model, if it names the owner; whether it still allows anything is another question."""
        return next((it for it in self.registry.grants if it.model == model and owner in it.terms.owners), None)

    def check(self, model: str, owner: str, use: str) -> Grant:
        """The grant that allows a use.

        Raises:
            TermsError: none does, or its tokens are used up.
        """
        return self._check(model, owner, use)

    def _check(self, model: str, owner: str, use: str, tokens: int = 1) -> Grant:
        grant = self.find(model, owner)
        used = 0 if grant is None else self._state.tokens_used(grant.id)
        return self.registry.check(model, owner, use, _now(), used, tokens)

    def reserve(self, model: str, owner: str, use: str, tokens: int) -> Reservation:
        """Take tokens from what a grant has left, before they are used: a service that is killed gives none back.

        Raises:
            TermsError: no grant allows it, or it has fewer left.
        """
        with self._lock:
            grant = self._check(model, owner, use, tokens)
            if grant.terms.tokens is not None:
                self._state.use_tokens(grant.id, tokens)
                return Reservation(grant.id, tokens)
            return Reservation(grant.id, 0)

    def settle(self, reservation: Reservation, used: int) -> None:
        """Note what was used in fact."""
        if used != reservation.tokens:
            self._state.use_tokens(reservation.grant, used - reservation.tokens)

    def charge_job(self, job: str, model: str, owner: str, tokens: int) -> None:
        """Take a job's tokens, in one instant with the note that they are taken.

        Raises:
            TermsError: no grant allows it, or it has fewer left.
        """
        with self._lock:
            grant = self._check(model, owner, FINE_TUNING, max(1, tokens))
            self._state.charge_job(job, grant.id, tokens)

    def check_job(self, model: str, owner: str) -> None:
        """See that a grant still lets a job run, whose tokens were taken when it began.

        Raises:
            TermsError: none does.
        """
        self.registry.check(model, owner, FINE_TUNING, _now(), 0, 0)

    def allows_job(self, model: str, owner: str) -> bool:
        """Whether `check_job` would let it run."""
        try:
            self.check_job(model, owner)
        except TermsError:
            return False
        return True

    def check_export(self, model: str, owner: str, adapter: str) -> Grant:
        """The grant by which an adapter may leave.

        Raises:
            TermsError: it may not.
        """
        return self.registry.check_export(model, owner, adapter, _now())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
