"""The model that a configuration describes, without weights: parameters on the meta device, other buffers as they are.

configuration  ->  the class built on the meta device  ->  dtypes as `from_pretrained` has them  ->  buffers filled in

Nothing of torch or transformers is patched and no default of the process is set, so that several threads may build
models at once: a mode of the building thread alone says where and in which dtype tensors are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from obfuscatune.enclave.config import blamed_on

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
