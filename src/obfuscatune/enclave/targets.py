"""LoRA on parameters by name (`target_parameters`): refused where a parameter lies on the worker.

PEFT passes over a name that it does not find. In a protected model that would leave out, without a word, every layer
whose weight is not in this process. So the model checks its adapters before it computes.
"""

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from obfuscatune.enclave.modules import AbsentWeight
from obfuscatune.wire.errors import ProtectionError


def watch_targets(model: nn.Module) -> None:
    """Have the model refuse to compute with an adapter that leaves out parameters which its configuration names."""
    model.register_forward_pre_hook(_check_targets)


def _check_targets(model: nn.Module, _inputs: Any) -> None:
    for adapter, config in (getattr(model, "peft_config", None) or {}).items():
        for target in getattr(config, "target_parameters", None) or ():
            absent = next((name for name in _absent_parameters(model) if _names(target, name)), None)
            if absent is not None:
                raise ProtectionError(
                    f"target_parameters names {target}, and {absent} lies on the worker: LoRA cannot be put on the "
                    "parameter itself. Name the layer in target_modules"
                )
            if not any(_names(target, name) for name in _wrapped_parameters(model, adapter)):
                raise ProtectionError(
                    f"target_parameters names {target}, and the model has no such parameter in this process; what is "
                    "on the worker can be adapted through target_modules alone"
                )


def _absent_parameters(model: nn.Module) -> Iterator[str]:
    """Paths of parameters in whose place an `AbsentWeight` stands."""
    for path, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), AbsentWeight) and not hasattr(module, "base_layer"):
            yield f"{_plain(path)}.weight"


def _wrapped_parameters(model: nn.Module, adapter: str) -> Iterator[str]:
    """Paths of the parameters that an adapter was put on."""
    for path, module in model.named_modules():
        if isinstance(module, ParamWrapper) and adapter in module.lora_A:
            yield f"{_plain(path)}.{module.parameter_name}"


def _plain(path: str) -> str:
    """The path that a module has in the model without PEFT."""
    return path.replace(".base_layer", "")


def _names(target: str, name: str) -> bool:
    """Whether PEFT would take `target` for that parameter."""
    return name == target or name.endswith(f".{target}")
