"""What a model's configuration files say, and the model that they describe, without weights.

    config.json  ->  the class built on the meta device  ->  dtypes as `from_pretrained` has them  ->  buffers filled in

The files are the provider's word, and no code of theirs is run: `auto_map` is dropped, `trust_remote_code` is False in
every call, and an attention or experts implementation that would fetch a kernel from the hub is refused. Nothing here
reads standard input.

Nothing of torch or transformers is patched and no default of the process is set, so that several threads may build
models at once: a mode of the building thread alone says where and in which dtype tensors are made.
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
"""Characters of an upstream error that are passed on; some list every architecture there is."""
ATTENTION = ("eager", "sdpa", "flex_attention")
"""Implementations of attention that run what is installed here; others may fetch a kernel from the hub."""
EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""Implementations of experts, with the same rule."""


def read_config(path: Path) -> PretrainedConfig:
    """The configuration in a directory, or in a file; the model's own code is never run.

    Raises:
        ModelFileError: there is none, it is not one that transformers knows, it needs code of the model's own or
            a kernel from the hub, or the weights are quantised.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelFileError(f"{path} holds no config.json, so it is no model in Hugging Face's layout")
    with blamed_on(file):
        written = json.loads(file.read_text("utf-8"))
    _refuse_what_runs_code(written, file)
    with blamed_on(file):
        return without_code(AutoConfig.from_pretrained(path, trust_remote_code=False))


def changed(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """A copy of a configuration with some attributes set, and without what would run a model's own code."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return without_code(config)


def without_code(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration, and those within it, stripped of what names code."""
    for part in _with_parts(config):
        for name in ("auto_map", "fusion_config"):  # what would replace classes by others
            vars(part).pop(name, None)
        if part._attn_implementation not in ATTENTION:
            part._attn_implementation_internal = None  # transformers chooses, among what is installed
    return config


def _with_parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            yield from _with_parts(part)


def _refuse_what_runs_code(written: Any, file: Path) -> None:
    """Refuse, by name, what a configuration asks for beyond numbers; `written` is its JSON or a part of it."""
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
    """Refuse an implementation that names a hub repository, or, where given, any but those `among` which are here.

    Args:
        value: of `attn_implementation` or `experts_implementation`: a name, or a dict of names by part of the model.
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
    """How the model is to generate, where the directory says so.

    Raises:
        ModelFileError: it says so in a way that cannot be read.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return None
    with blamed_on(path):
        return GenerationConfig.from_pretrained(directory)


@contextmanager
def blamed_on(file: Path | str) -> Iterator[None]:
    """Whatever transformers raises over a file's content, as one ModelFileError that names the file."""
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
    """Within it, this thread makes tensors on the meta device, floating-point ones in `dtype` where none is said."""

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
        unsaid = kwargs.get("dtype") is None and made.dtype == torch.get_default_dtype()
        return made.to(self._dtype) if unsaid else made


def empty_model(config: PretrainedConfig, auto_class: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model with its parameters and persistent buffers on the meta device, and its other buffers real.

    Args:
        auto_class: which head, as in transformers.
        dtype: of the parameters; None for that of the configuration, float32 where it has none. As in
            `from_pretrained`, an architecture may keep some modules in float32.

    Raises:
        ModelFileError: no model can be made of that configuration, or none with that head.
    """
    wanted = dtype or _dtype_of(config)
    with blamed_on("config.json"):
        with _MetaMode(wanted):
            model: PreTrainedModel = auto_class.from_config(config, dtype=None, trust_remote_code=False)
        _tell_dtype(model.config, wanted)
        _keep_in_float32(model, wanted)
        for name, buffer in model.named_non_persistent_buffers():
            put(model, name, torch.empty_like(buffer, device="cpu"))
        initialize(model)
    return model


def initialize(model: PreTrainedModel) -> None:
    """Give every tensor that is not on the meta device the value that the architecture starts with.

    What transformers calls `initialize_weights`, which for its own protection patches torch meanwhile. Here nothing
    has been read yet that would need it.
    """

    def visit(module: nn.Module, init: Callable[[nn.Module], None]) -> None:
        for child in module.children():
            visit(child, child._init_weights if isinstance(child, PreTrainedModel) else init)
        init(module)

    with torch.no_grad():
        visit(model, model._init_weights)


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or a buffer by its dotted name."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf in owner._parameters:
        was = owner._parameters[leaf]
        trains = was is not None and was.requires_grad and tensor.is_floating_point()
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=trains)
    else:
        owner._buffers[leaf] = tensor


def _dtype_of(config: PretrainedConfig) -> torch.dtype:
    said = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, said) if isinstance(said, str) else said


def _tell_dtype(config: PretrainedConfig, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            part.dtype = dtype


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, groups, _ = build_glob_alternation(list(plan))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (match := pattern.search(name)) is not None and match.lastgroup is not None:
            put(model, name, parameter.detach().to(plan[groups[match.lastgroup]]))
