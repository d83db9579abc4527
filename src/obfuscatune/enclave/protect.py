"""`protect`: put a model that is in memory under protection, in place.

find the groups of layers  ->  W  ->  W_star  ->  worker  ->  protected layer in the plain one's place
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from obfuscatune.enclave.client import RetryPolicy, WorkerLink, open_link
from obfuscatune.enclave.experts import ProtectedExperts
from obfuscatune.enclave.fleet import Worker, Workers, open_fleet, parties_of
from obfuscatune.enclave.keys import RootKey
from obfuscatune.enclave.layers import ProtectedLayer, first_protected
from obfuscatune.enclave.local_worker import local_worker
from obfuscatune.enclave.observer import Observer
from obfuscatune.enclave.placement import device_of, enclave_device
from obfuscatune.enclave.profiles import Profile, resolve
from obfuscatune.enclave.protected_model import Closable, ProtectedModel, extend, has_adapter
from obfuscatune.enclave.protection import Clients, Masking, Protection, place, refuse_provider_adapter
from obfuscatune.enclave.published import Base, warn_of_public_base
from obfuscatune.enclave.spill_store import SPILLED_AT_LEAST_IN, SpillStore, WeightFromSpillStore
from obfuscatune.enclave.target_layers import find_groups, refuse_absent_weights
from obfuscatune.enclave.training_hooks import TrainingWatch, watch_targets
from obfuscatune.errors import ConfigError, ProtectionError
from obfuscatune.fleet.fleet_file import Fleet
from obfuscatune.fleet.policy import key_of
from obfuscatune.protocol.tls import TlsConfig, pins

Model = TypeVar("Model", bound=nn.Module)
Progress = Callable[[int, int, str], None]
"""Called with (groups done, groups in all, name of the group just done)."""


def protect(
    model: Model,
    workers: Workers = None,
    profile: str | Profile = "private",
    *,
    key: RootKey | None = None,
    tls: TlsConfig | None = None,
    deadline_s: float = 120.0,
    retry: RetryPolicy | None = None,
    progress: Progress | None = None,
    base: Base | None = None,
    observer: Observer | None = None,
    mask_worker: Workers = None,
    masking: Masking | None = None,
    device: torch.device | str | None = None,
    **knobs: Any,
) -> Model:
    """Move a model's large linear layers, transformed, to a worker.

    The model is changed in place and returned; should this raise, nothing was changed. Everything else about it
    stays as it was: PEFT may have wrapped it before or may wrap it afterwards, `generate`, `Trainer` and
    gradient checkpointing work.
    Until this returns the plain weights are in this process's memory; `load` avoids that. The transformed ones are
    written to this process's disk (`TMPDIR`), for a worker that loses them: four bytes for each element, eight of a
    float64 model.

    Args:
        model: a Hugging Face causal LM or encoder, or a PEFT model around one. Base weights become frozen.
        workers: the worker's address (`unix:/run/x.sock`, `tcp:host:port`, `device:cuda:0`), or an open link; several
            addresses, or a `Fleet`, for many workers that act as one (docs/fleet.md). None starts a worker on this
            machine, which ends with the model; profile `enclave` needs none.
        profile: name of a profile, or a profile.
        key: root key of the transforms; with the same key the worker need not be sent the same matrices again.
        tls: identity and pinned peer, for a worker across a network.
        deadline_s: seconds within which the worker must answer a request.
        retry: how often and how long to try again; the link's default where not given.
        progress: called after each group of layers.
        base: "closed" where the base model's weights were never public, "public" where they are; None looks for signs,
            and warns with PublicBaseWarning. That the weights themselves are published, and workers may have them, is
            said by `public_base=True`, a knob of profile `guarded`.
        observer: told of the secrets and of every request's plain rows, by an audit.
        mask_worker: under profile `guarded`, the worker that multiplies the masks, as `workers`: one that does not
            collude with the other. None, with no `workers`, starts both on this machine, in one hand.
        masking: how the mask worker is reached, the memory of masks that are drawn ahead, and their budget.
        device: where the enclave's own part is to lie: "cpu", or "cuda:N", a confidential GPU that belongs to the
            enclave. None leaves it where it is.
        knobs: single settings of the profile: `shield_rows=32`, `first_blocks=1`, `transform="haar"`.

    Raises:
        ConfigError: an unknown profile, knob or address.
        ProtectionError: nothing to protect, or the model is protected already.
        WireError: the worker cannot be reached or refuses.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("my-model")
        >>> with obfuscatune.protect(model, "unix:/run/worker.sock"):  # or model.close() when it is done with
        ...     model.generate(**tokenizer("Once upon a time", return_tensors="pt"))
    """
    if getattr(model, "protection", None) is not None:
        raise ProtectionError("this model is protected already")
    resolved = resolve(profile, **knobs)
    if isinstance(config := getattr(model, "config", None), PretrainedConfig):
        warn_of_public_base(base, resolved, config, _directory_of(config), stacklevel=2)
    if resolved.lora_on == "worker":
        refuse_provider_adapter(model)
    groups = find_groups(model, resolved.first_blocks) if resolved.offload else []
    refuse_absent_weights(model, groups)
    own_device = enclave_device(device, workers, mask_worker)
    masking = masking or Masking()
    clients = open_clients(workers, mask_worker, resolved, tls, masking, deadline_s, retry)
    protection = Protection.start(clients, resolved, key, width_of(model), observer, masking)
    layers: dict[str, ProtectedLayer | ProtectedExperts] = {}
    with released_on_failure(protection, clients):
        spill_store = SpillStore()
        for done, group in enumerate(groups, start=1):
            with torch.no_grad():
                obfuscated = protection.obfuscate(group, group.joint_weight(), SPILLED_AT_LEAST_IN)
                sent = protection.send(group, obfuscated, WeightFromSpillStore(spill_store))
                layers |= protection.layers(group, sent)
            if progress is not None:
                progress(done, len(groups), group.name)
    place(model, layers)
    if own_device is not None:
        model.to(own_device)
    adopt(model, protection)
    if protection.lora_on_worker and isinstance(model, PeftModel):
        with released_on_failure(protection, clients):
            protection.move_adapter(model)
    return model


def _directory_of(config: PretrainedConfig) -> Path | None:
    """Where a model in memory was read from, if that was a directory here."""
    path = Path(getattr(config, "_name_or_path", None) or "/")
    return path if path.is_dir() else None


def width_of(model: nn.Module) -> int | None:
    """Of the residual stream, where the model's configuration tells."""
    config: Any = getattr(model, "config", None)
    width = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "hidden_size", None)
    return width if isinstance(width, int) else None


def open_clients(
    workers: Workers,
    mask_worker: Workers,
    profile: Profile,
    tls: TlsConfig | None,
    masking: Masking,
    deadline_s: float,
    retry: RetryPolicy | None,
) -> Clients:
    """The workers' clients: those that are given, or connected to an address, or to workers started for the model.

    Raises:
        ConfigError: a worker is named that is not needed, or missing, or named twice; certificates are given for one on
            this machine.
        WireError: one cannot be reached, or did not start.
    """
    check_workers(workers, mask_worker, profile, tls, masking)
    if not profile.offload:
        return Clients(None)
    compute_worker, mask = parties_of(workers, mask_worker, masks=profile.masks)
    opened: list[WorkerLink] = []

    def client(worker: Worker, tls: TlsConfig | None) -> WorkerLink:
        if isinstance(worker, WorkerLink):
            return worker
        opened.append(_opened(worker, tls, deadline_s, retry or RetryPolicy()))
        return opened[-1]

    try:
        compute = client(compute_worker, tls)
        mask_tls = masking.tls or (tls if isinstance(mask, Fleet) else None)
        return Clients(compute, client(mask, mask_tls) if profile.masks else None, tuple(opened))
    except BaseException:
        for one in opened:
            one.close()
        raise


def check_workers(
    workers: Workers,
    mask_worker: Workers,
    profile: Profile,
    tls: TlsConfig | None,
    masking: Masking,
) -> None:
    """Return where a model can be protected with these workers; nothing is connected.

    Raises:
        ConfigError: they do not fit the profile, or each other.
    """
    if not profile.offload and (workers is not None or mask_worker is not None):
        raise ConfigError(f"profile {profile.name!r} runs without a worker: name none")
    for worker in (workers, mask_worker):
        if not isinstance(worker, str | WorkerLink | Fleet | list | tuple | None):
            raise ConfigError(f"expected a worker's address, found a {type(worker).__name__}: pass its .address")
    workers, mask_worker = parties_of(workers, mask_worker, masks=profile.masks)
    if profile.lora_on == "worker" and isinstance(workers, Fleet):
        raise ConfigError(f"profile {profile.name!r} has LoRA on the worker, which must be one: name it by --worker")
    if profile.lora_on == "worker" and device_of(workers) is not None:
        raise ConfigError(
            f"profile {profile.name!r} has LoRA on the worker, and a device only multiplies: start a worker process by "
            "`obfuscatune worker --device cuda`, and name its address"
        )
    if not profile.masks:
        if mask_worker is not None or masking.tls is not None:
            raise ConfigError(f"profile {profile.name!r} has no masks: a mask worker is for profile 'guarded'")
        return
    if (workers is None) != (mask_worker is None):
        raise ConfigError(
            f"profile {profile.name!r} takes two workers in different hands: name both, by --worker and --mask-worker "
            "(workers= and mask_worker=), or neither, to try it out with two on this machine"
        )
    device = device_of(workers)
    if workers is not None and (workers == mask_worker or (device is not None and device == device_of(mask_worker))):
        raise ConfigError("the mask worker is the worker: whoever holds both sees through the masks; name two")
    mask_tls = masking.tls or (tls if isinstance(mask_worker, Fleet) else None)
    if _keys(workers, tls) & _keys(mask_worker, mask_tls):
        raise ConfigError(
            "worker and mask worker are pinned by the same key: whoever has it sees through the masks; have each make "
            "its own by `obfuscatune keygen`"
        )


def _keys(worker: Worker, tls: TlsConfig | None) -> frozenset[str]:
    """The keys that a worker, or a fleet, may show, or have signed."""
    own: set[str] = set()
    if isinstance(worker, Fleet) and worker.party is not None:
        own = {key for member in worker.members if (key := key_of(member)) is not None}
        own |= set(worker.trusted_keys(worker.party))
    pinned = pins(tls) if tls is not None and tls.peers else frozenset()
    return pinned | own


def _opened(worker: str | Fleet | None, tls: TlsConfig | None, deadline_s: float, retry: RetryPolicy) -> WorkerLink:
    """Connected to an address or a fleet, or to a worker that is started here for the client and ends with it."""
    if isinstance(worker, Fleet):
        return open_fleet(worker, tls=tls, deadline_s=deadline_s, patience_s=retry.patience_s)
    if worker is not None:
        return open_link(worker, tls=tls, deadline_s=deadline_s, retry=retry)
    if tls is not None:
        raise ConfigError("certificates are for a worker across a network: give its address, tcp:HOST:PORT")
    started = local_worker()  # ends when nothing refers to it: should the client not connect, at once
    client = open_link(started.address, deadline_s=deadline_s, retry=retry)
    client.own(started.close)
    return client


@contextmanager
def released_on_failure(protection: Protection, clients: Clients) -> Iterator[None]:
    """Should what follows fail, have the workers forget and hang up; clients that were handed in stay open."""
    try:
        yield
    except BaseException:
        for client in clients.opened:
            client.close()
        raise


def adopt(model: nn.Module, protection: Protection) -> None:
    """Hang the protection on the model, freeze it, and have its methods answer for what is on the worker too.

    Where PEFT put adapters in before, it froze the base already, and what it left trainable stays so.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for module in {model, base}:
        module.protection = protection
        extend(module, ProtectedModel if isinstance(module, PreTrainedModel) else Closable)
    if not (has_adapter(base) or isinstance(model, PeftModel)):
        model.requires_grad_(False)
    watch_targets(base)
    if protection.client is not None:
        watch = TrainingWatch(base, protection)
        first = first_protected(base)
        if first is not None:
            first.before_request = watch
