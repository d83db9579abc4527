"""Keyword arguments of `from_pretrained`, as `load` takes them: some act, some have one value, some are refused.

load(path, **keywords)  ->  Keywords: from which files, and what is changed in the configuration
                        ->  what is left: knobs of the profile
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from obfuscatune.enclave.config import ATTENTION, EXPERTS, refuse_kernels
from obfuscatune.errors import ConfigError

HEAD = ("num_labels", "id2label", "label2id", "problem_type")
"""What a new head needs to know; each overrides the configuration's attribute of that name."""
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "trust_remote_code": ((False, None), "an enclave runs no code that comes with a model; leave it out"),
    "device_map": (
        (None, "cpu", {"": "cpu"}),
        "the enclave's part is loaded to the CPU and the rest goes to the worker; leave it out, and call .to() after",
    ),
    "use_safetensors": ((True, None), "only safetensors are read: they hold nothing that runs; leave it out"),
    "weights_only": ((True, None), "only safetensors are read: they hold nothing that runs; leave it out"),
    "low_cpu_mem_usage": ((True, False, None), ""),
    "ignore_mismatched_sizes": ((False, None), "a tensor of another shape is an error; correct the configuration"),
    "output_loading_info": ((False, None), "what is newly initialised is said in a warning; leave it out"),
    "use_kernels": ((False, None), "an enclave fetches no kernels from the hub; leave it out"),
}
"""Keywords that have one meaning here: the values that have it, and why others are refused."""
_QUANTISED = (
    "protection transforms whole weights: load the model's unquantised files, with dtype=torch.bfloat16 perhaps"
)
_REFUSED = {
    "quantization_config": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "load_in_4bit": _QUANTISED,
    "gguf_file": _QUANTISED,
    "max_memory": "the large matrices go to the worker: set its quota by `obfuscatune worker --quota`",
    "offload_folder": "the large matrices go to the worker, and are read from the model's own files again",
    "offload_buffers": "buffers stay in the enclave",
    "state_dict": "weights are read from files; for a model in memory use obfuscatune.protect",
    "kernel_config": "an enclave fetches no kernels from the hub",
    "fusion_config": "layers are protected as the architecture has them",
    "tp_plan": "the large matrices go to the worker",
    "tp_size": "the large matrices go to the worker",
    "distributed_config": "the large matrices go to the worker",
    "adapter_kwargs": "load the base model, then wrap it: peft.PeftModel.from_pretrained(model, adapter)",
    "key_mapping": "tensors are found by the names that transformers knows for the architecture",
}
"""Keywords that cannot be followed, and what to do."""


@dataclass(frozen=True)
class HubOptions:
    """How files are taken from the hub; the names are those of `from_pretrained`.

    Attributes:
        revision: branch, tag or commit.
        token: of a member, where the one kept by `hf auth login` is not to be used.
        cache_dir: where downloads are kept.
        subfolder: folder of the repository, or of the local directory, that the model is in.
        variant: the weights are in `model.<variant>.safetensors`.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""
    variant: str | None = None

    def download(self) -> dict[str, Any]:
        """Arguments for `huggingface_hub`."""
        names = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Keywords:
    """What `load` was told in words of `from_pretrained`.

    Attributes:
        hub: from which files.
        dtype: a dtype, None for that of the configuration.
        config: a configuration in place of the files' own.
        changes: attributes of the configuration to set.
    """

    hub: HubOptions
    dtype: torch.dtype | None
    config: PretrainedConfig | None
    changes: dict[str, Any]

    @classmethod
    def take(cls, keywords: dict[str, Any], dtype: torch.dtype | str | None, revision: str | None) -> Keywords:
        """Take from `keywords` what is of `from_pretrained`; what is left there is not.

        Raises:
            ConfigError: one that cannot be followed here, by name, with what to do.
        """
        for name, reason in _REFUSED.items():
            if keywords.pop(name, None):
                raise ConfigError(f"{name} cannot be used with a protected model: {reason}")
        for name, (values, reason) in _ONLY.items():
            if (value := keywords.pop(name, None)) not in values and not _is_cpu(value):
                raise ConfigError(f"{name}={value!r} cannot be used with a protected model: {reason}")
        options = {it.name: keywords.pop(it.name) for it in fields(HubOptions) if it.name in keywords}
        changes = {name: keywords.pop(name) for name in HEAD if name in keywords}
        for name, known in (("attn_implementation", ATTENTION), ("experts_implementation", EXPERTS)):
            if (value := keywords.pop(name, None)) is not None:
                refuse_kernels(value, name, ConfigError, among=known)
                changes[f"_{name}"] = value
        torch_dtype = keywords.pop("torch_dtype", None)
        return cls(
            HubOptions(revision, **options),
            parse_dtype(dtype if dtype is not None else torch_dtype),
            keywords.pop("config", None),
            changes,
        )


def _is_cpu(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cpu"


def parse_dtype(dtype: Any) -> torch.dtype | None:
    """A floating-point dtype from itself or its name; None for None and "auto".

    Raises:
        ConfigError: it is none.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f'dtype: expected a floating-point torch.dtype, its name or "auto", found {dtype!r}')
    return found
