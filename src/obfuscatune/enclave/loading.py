"""`load`: protect a model straight from its files, so that this process never holds the large matrices together.

config  ->  model without weights  ->  for each group: read W, make W_star in its place, send it
                                   ->  meanwhile, read what stays in the enclave

Two groups at a time, each by a thread of its own from its files to the worker: two large matrices are in memory, or of
very large ones one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from obfuscatune.enclave.checkpoint import Checkpoint, shard_names, weights_names
from obfuscatune.enclave.client import RetryPolicy
from obfuscatune.enclave.config import empty_model, read_config, read_generation_config, with_changes
from obfuscatune.enclave.fleet import Workers
from obfuscatune.enclave.keys import RootKey
from obfuscatune.enclave.keywords import HubOptions, Keywords
from obfuscatune.enclave.observer import Observer, StageClock
from obfuscatune.enclave.placement import enclave_device
from obfuscatune.enclave.profiles import Profile, resolve
from obfuscatune.enclave.protect import Progress, adopt, open_clients, released_on_failure, width_of
from obfuscatune.enclave.protection import Masking, Protection, place
from obfuscatune.enclave.published import Base, warn_of_public_base
from obfuscatune.enclave.spill_store import Offloaded, WeightFromFiles
from obfuscatune.enclave.target_layers import LayerGroup, find_groups
from obfuscatune.enclave.threads import map_in_threads
from obfuscatune.enclave.tiles import at_the_end, place_bytes
from obfuscatune.enclave.weights import StoredWeights
from obfuscatune.errors import ModelFileError
from obfuscatune.protocol.tls import TlsConfig

AT_A_TIME = 2
"""Groups that are on their way at a time: while one is read or sent, the other is transformed."""
PLACES_BYTES = 1 << 29
"""Memory for them together, unless one alone takes more: where matrices are very large, one at a time is enough."""
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")
"""Configuration, tokenizer, templates, the index of the weights, and the card, which may name a base model."""
IN_FOLDERS = ("[!a]*/*", "a[!d]*/*")
"""What lies in folders, which holds second copies of a model (original/, onnx/); not additional_chat_templates/."""
_HUB_REASONS = (
    (RepositoryNotFoundError, "it has none of that name, or shows it to members alone: log in by `hf auth login`"),
    (HFValidationError, "there are no such names there"),
    (LocalEntryNotFoundError, "it cannot be reached, and nothing of the model was kept here"),
)


def load(
    model: str | Path,
    workers: Workers = None,
    profile: str | Profile = "private",
    *,
    dtype: torch.dtype | str | None = None,
    auto_class: Any = AutoModelForCausalLM,
    revision: str | None = None,
    key: RootKey | None = None,
    tls: TlsConfig | None = None,
    deadline_s: float = 120.0,
    retry: RetryPolicy | None = None,
    progress: Progress | None = None,
    clock: StageClock | None = None,
    base: Base | None = None,
    observer: Observer | None = None,
    mask_worker: Workers = None,
    masking: Masking | None = None,
    device: torch.device | str | None = None,
    **keywords: Any,
) -> PreTrainedModel:
    """A protected model from a local directory or from the Hugging Face hub.

    Args:
        model: a directory with `config.json` and safetensors, or a hub id.
        workers: the worker's address, or an open link. None starts a worker on this machine, which ends with the
            model; profile `enclave` needs none.
        profile: name of a profile, or a profile.
        dtype: dtype of the parameters in the enclave and on the worker, or its name; None or "auto" for that of the
            configuration.
        auto_class: which head, as in `transformers`: `AutoModelForCausalLM`, `AutoModel`, ...
        revision: branch, tag or commit on the hub.
        key, tls, deadline_s, retry, progress: as in `protect`.
        clock: filled in with the seconds that each stage takes.
        base: "closed" where the base model's weights were never public, "public" where they are; None looks for signs,
            and warns with PublicBaseWarning. That the weights themselves are published, and workers may have them, is
            said by `public_base=True`, a knob of profile `guarded`.
        observer: told of the secrets and of every request's plain rows, by an audit.
        mask_worker, masking, device: as in `protect`.
        keywords: knobs of the profile, as in `protect`, and what `from_pretrained` takes: token, cache_dir, subfolder,
            variant, local_files_only, force_download, attn_implementation, num_labels, config, ... (keywords.py); what
            cannot be followed is refused by name.

    Returns:
        The model in evaluation mode, as `from_pretrained` returns it. `close()`, or a `with` around it, has the worker
        forget it; so does the last reference to it.

    Raises:
        ModelFileError: the directory cannot be read as a model of floating-point safetensors.
        ConfigError, ProtectionError, WireError: as in `protect`.
    """
    told = Keywords.take(keywords, dtype, revision)
    resolved = resolve(profile, **keywords)
    directory = find_directory(model, hub=told.hub)
    config = with_changes(told.config or read_config(directory), told.changes)
    warn_of_public_base(base, resolved, config, directory, stacklevel=2)
    checkpoint = Checkpoint(directory, told.hub.variant)  # stays open: a worker that lost a matrix is sent it again
    skeleton = empty_model(config, auto_class, told.dtype)
    generation = read_generation_config(directory)
    groups = find_groups(skeleton, resolved.first_blocks) if resolved.offload else []
    weights = StoredWeights(checkpoint, skeleton)
    masking, own_device = masking or Masking(), enclave_device(device, workers, mask_worker)
    clients = open_clients(workers, mask_worker, resolved, tls, masking, deadline_s, retry)
    protection = Protection.start(clients, resolved, key, width_of(skeleton), observer, masking)
    clock = clock or StageClock()
    with released_on_failure(protection, clients):
        work = partial(_offload, weights=weights, protection=protection, clock=clock)
        size = max((place_bytes(it.shape, it.dtype, protection.transformed_in(it.dtype)) for it in groups), default=0)
        at_a_time = max(1, min(AT_A_TIME, PLACES_BYTES // max(size, 1)))
        places = [torch.empty(size, dtype=torch.uint8) for _ in groups[:at_a_time]]
        with map_in_threads(work, groups, places, protection.broken_off) as offloaded:
            with clock.measure("reading"):
                weights.fill(groups)
            for done, (group, layer) in enumerate(zip(groups, offloaded, strict=True), start=1):
                place(skeleton, protection.layers(group, layer))
                if progress is not None:
                    progress(done, len(groups), group.name)
        if own_device is not None:
            skeleton.to(own_device)
    if generation is not None:
        skeleton.generation_config = generation
    skeleton.name_or_path = str(model)  # as from_pretrained has it: adapters name their base so, not a cache's folder
    adopt(skeleton, protection)
    return skeleton.eval()


def find_directory(model: str | Path, revision: str | None = None, hub: HubOptions | None = None) -> Path:
    """The local directory of a model, downloaded from the hub where it is not a directory here.

    Raises:
        ModelFileError: it is not, and the hub gave none.
    """
    hub = hub or HubOptions(revision)
    if Path(model).is_dir():
        return Path(model) / hub.subfolder
    within = f"{hub.subfolder.rstrip('/')}/" if hub.subfolder else ""
    weights = [f"{within}{name}" for name in weights_names(hub.variant)]
    with _from_hub(model, "a directory here"):
        snapshot = snapshot_download(
            str(model),
            allow_patterns=[*(within + pattern for pattern in SMALL_FILES), *weights],
            ignore_patterns=[within + pattern for pattern in IN_FOLDERS],
            **hub.download(),
        )
    directory = Path(snapshot) / hub.subfolder
    unusual = [f"{within}{name}" for name in shard_names(directory, hub.variant) if not (directory / name).is_file()]
    if unusual:  # an index may name its shards as it likes
        with _from_hub(model, "a directory here"):
            snapshot_download(str(model), allow_patterns=unusual, **hub.download())
    return directory


def find_config(model: str | Path) -> Path:
    """The `config.json` of a model or the directory that it is in; of the hub nothing else is fetched.

    Raises:
        ModelFileError: there is none here, and the hub gave none.
    """
    if Path(model).exists():
        return Path(model)
    with _from_hub(model, "a config.json, nor a directory with one,"):
        return Path(hf_hub_download(str(model), "config.json"))


@contextmanager
def _from_hub(model: str | Path, sought: str) -> Iterator[None]:
    """What the hub answers in place of files, as one ModelFileError that says what to do."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next((text for kind, text in _HUB_REASONS if isinstance(error, kind)), type(error).__name__)
        raise ModelFileError(
            f"{str(model)!r} is neither {sought} nor a model that the hub gave us: {reason}"
        ) from error


def _offload(
    group: LayerGroup,
    memory: Tensor,
    in_turn: Callable[[], None],
    *,
    weights: StoredWeights,
    protection: Protection,
    clock: StageClock,
) -> Offloaded:
    """One group from its files to the worker; W, and W_star in its place, lie in `memory`, which is free afterwards."""
    with clock.measure("reading"):
        W = at_the_end(memory, group.shape, group.dtype, protection.transformed_in(group.dtype))
        weights.joint_weight(group, W)
    with clock.measure("transforming"):
        obfuscated = protection.obfuscate(group, W, memory=memory)
    with clock.measure("sending"):
        in_turn()  # a worker is sent the matrices in the model's order
        return protection.send(group, obfuscated, WeightFromFiles(partial(weights.joint_weight, group), group.name))
