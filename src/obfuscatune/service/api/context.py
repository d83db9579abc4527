"""Who asks, and what of the service a route needs."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from obfuscatune.channel.grants import Grant
from obfuscatune.service import tables as rows
from obfuscatune.service.access import Access
from obfuscatune.service.api.errors import ApiError
from obfuscatune.service.api.tls import peer_of
from obfuscatune.service.audit_log import AuditLog
from obfuscatune.service.keys import Owner, Owners
from obfuscatune.service.limits import RateLimits
from obfuscatune.service.metrics import Metrics
from obfuscatune.service.models import LOADING, AdapterPlace, Models, ServedModel
from obfuscatune.service.provider_words import ProviderWords
from obfuscatune.service.receipt import Attestation
from obfuscatune.service.settings import Settings
from obfuscatune.service.state import Row, State
from obfuscatune.training.storage import RunDirectory

if TYPE_CHECKING:
    from obfuscatune.service.jobs import Jobs

FINE_TUNED = "ft:"
_CHECKPOINT = re.compile(r"ckpt-step-([0-9]{1,9})")


@dataclass
class Context:
    """All parts of a service, for its routes."""

    settings: Settings
    state: State
    storage: RunDirectory
    """Of uploaded files, sealed."""
    owners: Owners
    access: Access
    models: Models
    rates: RateLimits
    metrics: Metrics
    log: AuditLog
    attested: Attestation
    jobs: "Jobs"
    words: ProviderWords
    wording: threading.Lock = field(default_factory=threading.Lock)
    """One word of a provider's, or request for one, at a time: the registry, what is kept and what is loaded go
    together."""
    storing: threading.Lock = field(default_factory=threading.Lock)
    """Files are stored one at a time, so that quotas hold."""
    estimating: threading.Lock = field(default_factory=threading.Lock)
    """Of `estimate`: one at a time."""

    @property
    def files(self) -> Path:
        """Where sealed files lie, below `storage`."""
        return Path("files")

    def ask_consent(self, model: str, owner: str, adapter: str) -> None:
        """Note that an owner wants an adapter out, where its provider wants to be asked; it is kept over a restart.

        Raises:
            StorageError: the database refused.
        """
        registry = self.access.registry
        with self.wording:
            before, served = registry.asked(model), self.models.get(model)
            registry.ask_consent(model, owner, adapter)
            if served is not None and (waiting := registry.asked(model)) != before:
                self.words.keep_asked(served.grant, served.key.secret, waiting)


@dataclass(frozen=True)
class Target:
    """What a client's `model` means."""

    name: str
    grant: Grant
    model: ServedModel
    adapter: str | None

    @property
    def engine(self) -> Any:
        """Its engine.

        Raises:
            ApiError: the model is being loaded, or cannot be.
        """
        if self.model.engine is None or self.model.status != "ready":
            if self.model.status == LOADING:
                raise ApiError(
                    503,
                    f"The model {self.grant.model} is being loaded.",
                    kind="server_error",
                    code="model_loading",
                    headers={"retry-after": "2"},
                )
            raise ApiError(503, "The model cannot answer.", kind="server_error", code="model_unavailable")
        return self.model.engine


def context_of(request: Request) -> Context:
    """The service that a request came to."""
    context: Context = request.app.state.context
    return context


def asker(request: Request) -> Owner:
    """The owner who asks.

    Raises:
        ApiError: the key of the connection's certificate is no owner's who released his key; or too many requests.
    """
    context = context_of(request)
    owner = context.owners.get(peer_of(request.scope))
    if owner is None:
        raise ApiError(
            401,
            "This service knows its clients by their certificates, and yours is no owner's whose key was released to "
            "it since it started. Verify the service and release your key: `obfuscatune owner proxy` does both.",
            kind="authentication_error",
            code="invalid_api_key",
        )
    context.rates.request(owner.spki)
    return owner


Ctx = Annotated[Context, Depends(context_of)]
Asker = Annotated[Owner, Depends(asker)]


def find_target(context: Context, owner: Owner, name: str) -> Target:
    """What an owner means by a model's name.

    Raises:
        ApiError: there is none of that name for this owner.
    """
    base = name.split(":")[1] if name.startswith(FINE_TUNED) and name.count(":") >= 4 else name
    grant = context.access.find(base, owner.spki)
    model = context.models.get(base)
    missing = ApiError(
        404,
        f"The model `{name[:200]}` does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )
    if grant is None or model is None:
        raise missing
    if base == name:
        return Target(name, grant, model, None)
    found = find_adapter(context, owner, name)
    if found is None:
        raise missing
    row, folder = found
    context.models.offer_adapter(name, AdapterPlace(owner.spki, row.clear["job"], folder))
    return Target(name, grant, model, name)


def find_adapter(context: Context, owner: Owner, name: str) -> tuple[Row, str] | None:
    """The row of a fine-tuned model, or of a checkpoint of one, and the folder of its factors."""
    parts = name.split(":")
    if len(parts) == 5:
        row = context.state.get(rows.adapters, owner, parts[4])
        folder = "adapter"
    elif len(parts) == 6 and (step := _CHECKPOINT.fullmatch(parts[5])) is not None:
        row = context.state.get(rows.checkpoints, owner, f"ftckpt_{parts[4]}-{step[1]}")
        folder = f"checkpoints/step-{int(step[1]):06d}"
    else:
        return None
    return None if row is None or row.details["model"] != name else (row, folder)


@contextmanager
def counted(context: Context, owner: Owner, target: Target, use: str, most: int) -> Iterator[list[int]]:
    """Within it up to `most` tokens may be used; the list is to be given the number that were.

    Raises:
        Busy: the owner asks for too much at once.
        TermsError: the grant does not allow it.
    """
    used: list[int] = []
    with context.rates.completion(owner.spki, most):
        reservation = context.access.reserve(target.grant.model, owner.spki, use, most)
        try:
            yield used
        finally:
            context.access.settle(reservation, sum(used))
