"""Models under protection: from a sealed bundle and its key to an engine that answers.

    bundle, key  ->  files in memory alone  ->  protected model  ->  engine
    fine-tuned model's name  ->  sealed adapter of a job  ->  the engine's adapters

A model is loaded in a thread of its own, because reading it may take minutes. The transforms' root key is drawn when
the service starts: a provider, who knows the bundle's key, must not be able to derive it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obfuscatune.channel.grants import Grant
from obfuscatune.errors import IntegrityError, ObfuscaTuneError, TermsError
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.secret_memory import SecretBytes
from obfuscatune.service.keys import Owners, job_key
from obfuscatune.service.sealed_files import SealedDirectory
from obfuscatune.service.settings import Settings

if TYPE_CHECKING:
    from obfuscatune.sealing.opening import Bundle
    from obfuscatune.service.engine import Engine

log = logging.getLogger(__name__)
_JOIN_SECONDS = 10.0
"""For a model that is being loaded when the service ends; then the process ends without it."""
LOADING, READY, FAILED = "loading", "ready", "failed"


@dataclass(frozen=True)
class AdapterPlace:
    """Where the factors of a fine-tuned model lie."""

    owner: str
    job: str
    folder: str
    """Within the job's run directory."""


@dataclass(eq=False)
class ServedModel:
    """A model, from its grant on."""

    grant: Grant
    key: BundleKey
    root_key: SecretBytes
    granted_at: int = field(default_factory=lambda: int(time.time()))
    status: str = LOADING
    reason: str = ""
    engine: "Engine | None" = None
    tokenizer: Any = None
    config: Any = None
    protection: Any = None
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def digest(self) -> str:
        """Of the bundle's manifest."""
        return self.grant.manifest


class Models:
    """The models of a service, by the names in their grants. Safe from any thread."""

    def __init__(self, settings: Settings, owners: Owners, on_ready: Callable[[ServedModel], None]) -> None:
        self._settings, self._owners, self._on_ready = settings, owners, on_ready
        self._models: dict[str, ServedModel] = {}
        self._adapters: dict[str, AdapterPlace] = {}
        self._lock = threading.Lock()
        self._root_key = SecretBytes.random(32)
        self._threads: list[threading.Thread] = []

    def open(self, grant: Grant, key: SecretBytes) -> "Bundle | None":
        """See whether a grant's bundle can be opened; nothing is changed yet. None where it is loaded already.

        Raises:
            TermsError: there are as many models as fit, or its bundle lies where none may.
            IntegrityError: it is not the bundle of the grant, or the key is another's.
            StorageError, ConfigError: the storage cannot be read.
        """
        from obfuscatune.sealing.opening import Bundle

        if not self._settings.may_hold(grant.storage):
            raise TermsError(f"storage: this service opens bundles within {', '.join(self._settings.bundles)} alone")
        known = self.get(grant.model)
        if known is not None and known.grant.manifest == grant.manifest and known.status != FAILED:
            if known.key.secret != key:
                raise IntegrityError("the key is another than the one under which the bundle was opened")
            return None
        with self._lock:
            if known is None and len(self._models) >= self._settings.limits.models:
                raise TermsError(f"models: this service holds at most {self._settings.limits.models}")
        signers = frozenset({grant.provider})
        return Bundle.open(
            grant.storage, key=BundleKey(key), manifest_digest=grant.manifest, signers=signers, kind="model"
        )

    def granted(self, grant: Grant, key: SecretBytes, bundle: "Bundle | None") -> None:
        """Load what `open` opened, in the place of another model of that name; or note the new terms of what is loaded.

        Args:
            key: is this object's from now on.
        """
        with self._lock:
            old = self._models.get(grant.model)
            if bundle is None and old is not None:
                old.grant = grant
                key.close()
                return
            model = self._models[grant.model] = ServedModel(grant, BundleKey(key), self._root_key)
            thread = threading.Thread(target=self._load, args=(model, bundle), name="model-loader", daemon=True)
            self._threads = [it for it in self._threads if it.is_alive()] + [thread]
        if old is not None:
            self._end(old)
        thread.start()

    def revoke(self, name: str) -> None:
        """Forget a model and its key."""
        with self._lock:
            model = self._models.pop(name, None)
            self._adapters = {adapter: it for adapter, it in self._adapters.items() if f":{name}:" not in adapter}
        if model is not None:
            self._end(model)

    def get(self, name: str) -> ServedModel | None:
        """A model, loaded or not; None where it was not granted."""
        with self._lock:
            return self._models.get(name)

    def states(self) -> Mapping[str, float]:
        """Number of models by status."""
        with self._lock:
            found = [it.status for it in self._models.values()]
        return {status: found.count(status) for status in (LOADING, READY, FAILED)}

    def all(self) -> list[ServedModel]:
        """All of them."""
        with self._lock:
            return list(self._models.values())

    def offer_adapter(self, name: str, place: AdapterPlace) -> None:
        """Let the engine find a fine-tuned model by its name. Whoever calls has checked that it may be used."""
        with self._lock:
            self._adapters[name] = place

    def withdraw_adapter(self, name: str) -> None:
        """Let nobody find it any more."""
        with self._lock:
            self._adapters.pop(name, None)

    def adapter_files(self, name: str) -> Mapping[str, bytes]:
        """The files of a fine-tuned model, in PEFT's format.

        Raises:
            TermsError: it is not offered, or a key that opens it is not here.
            StorageError: it cannot be read.
        """
        from obfuscatune.training.adapter import CONFIG, WEIGHTS

        with self._lock:
            place = self._adapters.get(name)
            model = self._models.get(name.split(":")[1]) if name.count(":") >= 4 else None
        if place is None or model is None:
            raise TermsError("model: this fine-tuned model is not there any more")
        directory = self.run_directory(model, place.owner, place.job)
        return {file: directory.read(f"{place.folder}/{file}") for file in (WEIGHTS, CONFIG)}

    def run_directory(self, model: ServedModel, owner: str, job: str) -> SealedDirectory:
        """The sealed run directory of a job.

        Raises:
            TermsError: the owner's key is not here.
        """
        released = self._owners.get(owner)
        if released is None:
            raise TermsError("owner-key: it was not released since the service started")
        return SealedDirectory(self.run_root(job), job_key(released, model.key.secret, job), job)

    def run_root(self, job: str) -> Path:
        """Where a job's run directory lies."""
        return self._settings.state / "runs" / job

    def close(self) -> None:
        """Stop the engines, have the workers forget, and zero the keys."""
        with self._lock:
            models, self._models = list(self._models.values()), {}
            threads, self._threads = self._threads, []
        for thread in threads:
            thread.join(_JOIN_SECONDS)
        for model in models:
            self._end(model)
        self._root_key.close()

    def _load(self, model: ServedModel, bundle: "Bundle") -> None:
        try:
            self._open(model, bundle)
        except ObfuscaTuneError as error:
            model.status, model.reason = FAILED, str(error)
            log.warning("model %s: %s", model.grant.model, error)
        except Exception as error:  # noqa: BLE001  whatever a library raises of a provider's files
            model.status, model.reason = FAILED, f"unexpected {type(error).__name__}"
            log.warning("model %s: unexpected %s", model.grant.model, type(error).__name__)
        else:
            with self._lock:
                stands = self._models.get(model.grant.model) is model
            if stands:
                model.status = READY
                self._on_ready(model)
                return
        model.resources.close()

    def _open(self, model: ServedModel, bundle: "Bundle") -> None:
        from obfuscatune.enclave.keys import RootKey
        from obfuscatune.service.engine import Engine, EngineLimits
        from obfuscatune.service.opening import open_protected, open_tokenizer
        from obfuscatune.training.run import MaskAccount
        from obfuscatune.training.storage import RunDirectory

        limits = self._settings.limits
        with ExitStack() as stack:
            directory = stack.enter_context(bundle.in_memory())
            model.tokenizer, model.config = open_tokenizer(directory)
            with model.root_key.view as view:
                key = RootKey(bytes(view))
            protected = stack.enter_context(open_protected(directory, self._settings, key, model.grant.model))
            model.protection = protected.protection
            # What was shown before a restart counts against the masks' budget.
            kept = RunDirectory(self._settings.state / "masks" / model.digest)
            stack.callback(MaskAccount.of(protected, kept).close)
            of_engine = EngineLimits(
                batch=limits.batch_sequences,
                cache_tokens=limits.cache_tokens,
                queue=limits.queue,
                adapters=limits.adapters,
            )
            engine = Engine(protected, model.tokenizer, of_engine, self.adapter_files)
            stack.callback(engine.close)
            model.engine = engine
            model.resources = stack.pop_all()

    def _end(self, model: ServedModel) -> None:
        model.status, model.reason = FAILED, "revoked or replaced"
        model.resources.close()
        model.key.close()
