"""`load`: protect a model straight from its files, so that this process never holds the large matrices together.

config  ->  model without weights  ->  for each group: read W, make W_star in its place, send it
                                   ->  meanwhile, read what stays in the enclave

Two groups at a time, each by a thread of its own from its files to the worker: two large matrices are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.checkpoint import Checkpoint, shard_names, weights_names
from obfuscatune.enclave.config import blamed_on, changed, read_config, read_generation_config
from obfuscatune.enclave.keys import RootKey
from obfuscatune.enclave.keywords import HubOptions, Keywords
from obfuscatune.enclave.lanes import in_lanes
from obfuscatune.enclave.link import RetryPolicy, WorkerLink
from obfuscatune.enclave.offloaded import Offloaded, WeightFromFiles
from obfuscatune.enclave.profiles import Profile, resolve
from obfuscatune.enclave.protect import Progress, adopt, open_link, released_on_failure, width_of
from obfuscatune.enclave.protection import Protection, place
from obfuscatune.enclave.sites import SiteGroup, find_groups
from obfuscatune.enclave.stages import StageClock
from obfuscatune.wire.errors import ModelFileError
from obfuscatune.wire.tls import TlsConfig

LANES = 2
"""Groups that are on their way at a time: while one is read or sent, the other is transformed."""
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""Configuration, tokenizer, templates, and the index of the weights."""
IN_FOLDERS = ("[!a]*/*", "a[!d]*/*")
"""What lies in folders, which holds second copies of a model (original/, onnx/); not additional_chat_templates/."""
_HUB_REASONS = (
    (RepositoryNotFoundError, "it has none of that name, or shows it to members alone: log in by `hf auth login`"),
    (HFValidationError, "there are no such names there"),
    (LocalEntryNotFoundError, "it cannot be reached, and nothing of the model was kept here"),
)


def load(
    model: str | Path,
    workers: str | WorkerLink | None,
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
    **keywords: Any,
) -> PreTrainedModel:
    """A protected model from a local directory or from the Hugging Face hub.

    Args:
        model: a directory with `config.json` and safetensors, or a hub id.
        workers: the worker's address, or an open link; None for profile `enclave`.
        profile: name of a profile, or a profile.
        dtype: dtype of the parameters in the enclave and on the worker, or its name; None or "auto" for that of the
            configuration.
        auto_class: which head, as in `transformers`: `AutoModelForCausalLM`, `AutoModel`, ...
        revision: branch, tag or commit on the hub.
        key, tls, deadline_s, retry, progress: as in `protect`.
        clock: filled in with the seconds that each stage takes.
        keywords: knobs of the profile, as in `protect`, and what `from_pretrained` takes: token, cache_dir, subfolder,
            variant, local_files_only, force_download, attn_implementation, num_labels, config, ... (keywords.py); what
            cannot be followed is refused by name.

    Returns:
        The model in evaluation mode, as `from_pretrained` returns it.

    Raises:
        ModelFileError: the directory cannot be read as a model of floating-point safetensors.
        ConfigError, ProtectionError, WireError: as in `protect`.
    """
    told = Keywords.take(keywords, dtype, revision)
    resolved = resolve(profile, **keywords)
    directory = find_directory(model, hub=told.hub)
    config = changed(told.config or read_config(directory), told.changes)
    checkpoint = Checkpoint(directory, told.hub.variant)  # stays open: a worker that lost a matrix is sent it again
    skeleton = empty_model(config, auto_class, told.dtype)
    generation = read_generation_config(directory)
    groups = find_groups(skeleton, resolved.first_blocks) if resolved.offload else []
    reader = _Reader(checkpoint, skeleton)
    link = open_link(workers, resolved, tls, deadline_s, retry)
    protection = Protection.start(link, resolved, key, width_of(skeleton))
    clock = clock or StageClock()
    with released_on_failure(protection, workers):
        work = partial(_offload, reader=reader, protection=protection, clock=clock)
        size = max((group.weight_bytes for group in groups), default=0)
        places = [torch.empty(size, dtype=torch.uint8) for _ in groups[:LANES]]
        with in_lanes(work, groups, places, protection.broken_off) as offloaded:
            with clock.measure("reading"):
                reader.fill(skeleton, groups)
            for done, (group, layer) in enumerate(zip(groups, offloaded, strict=True), start=1):
                place(skeleton, protection.layers(group, layer))
                if progress is not None:
                    progress(done, len(groups), group.name)
    if generation is not None:
        skeleton.generation_config = generation
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


def empty_model(config: PretrainedConfig, auto_class: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model with parameters on the meta device and real buffers: all of its shape, none of its weight.

    Raises:
        ModelFileError: no model can be made of that configuration, or none with that head.
    """
    with blamed_on("config.json"), init_empty_weights(include_buffers=False):
        return auto_class.from_config(config, dtype=dtype or config.dtype or torch.float32, trust_remote_code=False)


def _offload(
    group: SiteGroup,
    memory: Tensor,
    in_turn: Callable[[], None],
    *,
    reader: _Reader,
    protection: Protection,
    clock: StageClock,
) -> Offloaded:
    """One group from its files to the worker; W, and W_star in its place, lie in `memory`, which is free afterwards."""
    with clock.measure("reading"):
        W = reader.joint_weight(group, memory)
    with clock.measure("transforming"):
        obfuscated = protection.obfuscate(group, W)
    with clock.measure("sending"):
        in_turn()  # a worker is sent the matrices in the model's order
        return protection.send(group, obfuscated, WeightFromFiles(partial(reader.joint_weight, group), group.name))


class _Reader:
    """Finds a parameter's tensor under the name that it has in the files.

    That may be another than in the model: without the base model's prefix, or as it was called when the files
    were written (GPT-NeoX's head is `embed_out` there). `transformers` knows what became of which.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self._checkpoint = checkpoint
        conversions = get_model_conversion_mapping(model)
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        expected = model.state_dict()
        self._stored_name: dict[str, str] = {}
        for stored in checkpoint.names():
            name, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, expected)
            if converter is None:  # the others are made of several tensors, and are no tensor of the model as they are
                self._stored_name[name] = stored

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return self._checkpoint.read(self._locate(name), shape, dtype)

    def joint_weight(self, group: SiteGroup, memory: Tensor | None = None) -> Tensor:
        """W (p, q) of a group: the weights of layers that share an input side by side, y = x W.

        Args:
            memory: bytes, enough of them, to hold it; memory of its own if None.
        """
        p, q = group.shape
        if memory is None:
            W = torch.empty(p, q, dtype=group.dtype)
        else:
            W = memory[: group.weight_bytes].view(group.dtype).view(p, q)
        columns = W.split(list(group.widths), dim=1)
        for site, own in zip(group.sites, columns, strict=True):
            target = own if isinstance(site.layer, Conv1D) else own.T
            self._checkpoint.read_into(self._locate(f"{site.name}.weight"), target)
        return W

    def fill(self, model: PreTrainedModel, offloaded: list[SiteGroup]) -> None:
        """Read every parameter but the offloaded weights, tie what is tied, and see that nothing is left out."""
        away = {f"{site.path}.weight" for group in offloaded for site in group.sites}
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if name not in away and not (name in tied and self._locate(name) not in self._checkpoint):
                _put(model, name, nn.Parameter(self.read(name, parameter.shape, parameter.dtype)))
        for name, buffer in list(model.named_buffers()):
            if self._locate(name) in self._checkpoint and buffer.is_floating_point():
                _put(model, name, self.read(name, buffer.shape, buffer.dtype))
        model.tie_weights()
        absent = [name for name, parameter in model.named_parameters() if parameter.is_meta and name not in away]
        if absent:
            raise ModelFileError(f"the model's files lack {len(absent)} parameters, the first is {absent[0]!r}")

    def _locate(self, name: str) -> str:
        return self._stored_name.get(name, name)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor
