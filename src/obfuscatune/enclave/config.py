"""Reads a model's configuration files, and builds the model that they describe, without weights.

    config.json  ->  model on the meta device  ->  dtypes as in `from_pretrained`  ->  buffers with real values

No code that comes with a model is run: `auto_map` is dropped, `trust_remote_code` is False in every call, and an
attention or experts implementation that would fetch a kernel from the hub is refused. Nothing here reads stdin.

Several threads may build models at once: nothing of torch or transformers is patched, and no default of the process
is set. Device and dtype of new tensors are set by a `TorchFunctionMode`, which holds for the building thread alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from obfuscatune.errors import ModelFileError

LONGEST_REASON = 300
"""Most characters quoted of an error of transformers; some of them list every architecture."""
ATTENTION = ("eager", "sdpa", "flex_attention")
"""Implementations of attention that need no download; others may fetch a kernel from the hub."""
EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""Implementations of mixture-of-experts layers that need no download."""


def read_config(path: Path) -> PretrainedConfig:
    """Read the configuration in a file, or in a directory with a config.json.

    Raises:
        ModelFileError: there is no such file, transformers does not know the architecture, it needs code that comes
            with the model or a kernel from the hub, or the weights are quantised.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelFileError(f"{path} holds no config.json, so it is no model in Hugging Face's layout")
    with as_model_file_error(file):
        written = json.loads(file.read_text("utf-8"))
    _refuse_what_runs_code(written, file)
    with as_model_file_error(file):
        return without_code(AutoConfig.from_pretrained(path, trust_remote_code=False))


def with_changes(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """A copy of a configuration with the attributes in `changes` set, and without references to code."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return without_code(config)


def without_code(config: PretrainedConfig) -> PretrainedConfig:
    """Remove references to code from a configuration and its sub-configurations, in place; returns it."""
    for part in _with_parts(config):
        for name in ("auto_map", "fusion_config"):  # they would replace classes by others
            vars(part).pop(name, None)
        if part._attn_implementation not in ATTENTION:
            part._attn_implementation_internal = None  # transformers then chooses one that is installed
    return config


def _with_parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configuration and all its sub-configurations, of a vision tower for example."""
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            yield from _with_parts(part)


def _refuse_what_runs_code(written: Any, file: Path) -> None:
    """Refuse kernels from the hub and quantised weights anywhere in `written`, a JSON value of a configuration."""
    if isinstance(written, list):
        for part in written:
            _refuse_what_runs_code(part, file)
    if not isinstance(written, dict):
        return
    for name, value in written.items():
        kind = str(name).removeprefix("_").removesuffix("_internal")
        if kind == "attn_implementation":
            refuse_kernels(value, f"{file}: {name}", ModelFileError)
        elif kind == "experts_implementation":
            refuse_kernels(value, f"{file}: {name}", ModelFileError, among=EXPERTS)
        elif kind == "quantization_config" and value:
            raise ModelFileError(
                f"{file}: the weights are quantised, which protection cannot transform: load them whole"
            )
        else:
            _refuse_what_runs_code(value, file)


def refuse_kernels(value: Any, what: str, error: type[Exception], among: tuple[str, ...] | None = None) -> None:
    """Refuse an implementation that may be fetched from the hub.

    Args:
        value: of `attn_implementation` or `experts_implementation`: a name, or a dict of names by part of the model.
        what: what to call the setting in the message.
        error: class of the error.
        among: the allowed names; None allows every name that is not a hub repository ("owner/name").

    Raises:
        ModelFileError, ConfigError: as `error` says.
    """
    for name in value.values() if isinstance(value, dict) else [value]:
        if name is None:
            continue
        if not isinstance(name, str) or "/" in name or (among is not None and name not in among):
            raise error(
                f"{what} is {name!r}: an enclave fetches no kernel and runs no code that comes with a model; "
                f"expected {' or '.join(among or ATTENTION)}, or nothing"
            )


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """Read `generation_config.json`; None if the directory has none.

    Raises:
        ModelFileError: the file cannot be read.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return None
    with as_model_file_error(path):
        return GenerationConfig.from_pretrained(directory)


@contextmanager
def as_model_file_error(file: Path | str) -> Iterator[None]:
    """Turn any exception into a ModelFileError that names the file: transformers raises many kinds."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise ModelFileError(f"{file} cannot be used: {type(error).__name__}: {reason}") from error


_FACTORIES = {
    *(torch.empty, torch.empty_strided, torch.zeros, torch.ones, torch.full, torch.eye, torch.tensor),
    *(torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.rand, torch.randn, torch.arange),
    *(torch.linspace, torch.logspace, torch.hann_window, torch.hamming_window, torch.randint, torch.randperm),
    *(torch.tril_indices, torch.triu_indices),
}


class _MetaMode(TorchFunctionMode):
    """While active, new tensors of this thread are on the meta device, and floating-point ones default to `dtype`.

    An explicit `device` or `dtype` is respected.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _FACTORIES:
            return func(*args, **kwargs)
        if kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        made: Tensor = func(*args, **kwargs)
        by_default = kwargs.get("dtype") is None and made.dtype == torch.get_default_dtype()
        return made.to(self._dtype) if by_default else made


def empty_model(config: PretrainedConfig, auto_class: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """Build a model whose parameters and persistent buffers are on the meta device. Other buffers have real values.

    Args:
        auto_class: the class that chooses the head, such as `AutoModelForCausalLM`.
        dtype: of the parameters; None for that of the configuration, or float32 if it has none. As in
            `from_pretrained`, an architecture may keep some modules in float32.

    Raises:
        ModelFileError: no model can be built of that configuration with that head.
    """
    wanted = dtype or _dtype_of(config)
    with as_model_file_error("config.json"):
        with _MetaMode(wanted):
            model: PreTrainedModel = auto_class.from_config(config, dtype=None, trust_remote_code=False)
        _set_config_dtype(model.config, wanted)
        _keep_in_float32(model, wanted)
        for name, buffer in model.named_non_persistent_buffers():
            set_tensor(model, name, torch.empty_like(buffer, device="cpu"))
        initialize(model)
    return model


def initialize(model: PreTrainedModel) -> None:
    """Give every tensor that is not on the meta device its initial value.

    As `PreTrainedModel.initialize_weights`, which patches torch to protect weights that were read before. Here none
    were read yet.
    """

    def visit(module: nn.Module, init: Callable[[nn.Module], None]) -> None:
        for child in module.children():
            visit(child, child._init_weights if isinstance(child, PreTrainedModel) else init)
        init(module)

    with torch.no_grad():
        visit(model, model._init_weights)


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or a buffer, given its dotted name. A parameter keeps `requires_grad`."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf in owner._parameters:
        old = owner._parameters[leaf]
        requires_grad = old is not None and old.requires_grad and tensor.is_floating_point()
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        owner._buffers[leaf] = tensor


def _dtype_of(config: PretrainedConfig) -> torch.dtype:
    dtype = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _set_config_dtype(config: PretrainedConfig, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            part.dtype = dtype


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters that the architecture keeps in another dtype than `dtype`, usually float32."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, groups, _ = build_glob_alternation(list(plan))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (match := pattern.search(name)) is not None and match.lastgroup is not None:
            set_tensor(model, name, parameter.detach().to(plan[groups[match.lastgroup]]))
