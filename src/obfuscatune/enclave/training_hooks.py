"""A protected model under training: it notices the optimizer's steps, and says what comes to nothing.

    forward pass  ->  first protected layer  ->  TrainingWatch: did the trained parameters change since the last pass?
                                             ->  Protection.after_step: re-key what is due

Nobody has to tell it: whichever loop or optimizer trains the model, it changes parameters. (Their versions do not tell:
fused optimizers leave them as they are.)

LoRA on parameters by name (`target_parameters`) is refused where a parameter lies on the worker: PEFT passes over a
name that it does not find. In a protected model that would leave out, without a word, every layer whose weight is not
in this process. So the model checks its adapters before it computes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from obfuscatune.enclave.placeholder_tensors import AbsentWeight
from obfuscatune.enclave.protected_model import has_adapter
from obfuscatune.enclave.protection import Protection
from obfuscatune.errors import ProtectionError


class TrainingWatch:
    """Looks at a model at the beginning of each forward pass, called by its first protected layer."""

    def __init__(self, model: nn.Module, protection: Protection) -> None:
        """`model`: the one that was protected, without PEFT's wrapper."""
        self._model = weakref.ref(model)
        self._protection = protection
        self._has_looked = False
        protection.fingerprint = self._fingerprint

    def __call__(self, layer: nn.Module, x: Tensor) -> None:
        """Renew what is due after a step of the optimizer; warn, once, where training comes to nothing.

        Raises:
            WireError: see `Protection.rekey`.
        """
        model = self._model()
        if model is not None and layer.training and torch.is_grad_enabled() and not self._has_looked:
            self._has_looked = True
            _warn_of_lost_training(model)
        self._protection.notice_step()

    def _fingerprint(self) -> int:
        model = self._model()
        if model is None:
            return 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return sum(int(parameter.detach().reshape(-1).view(torch.int16).sum()) for parameter in trained)


def _warn_of_lost_training(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel) or has_adapter(model):
        return
    if any(parameter.requires_grad for parameter in model.parameters()):
        warnings.warn(
            "parameters of a protected model are trained, and no adapter was added: save_pretrained will refuse to "
            "save them. Wrap the model with peft.get_peft_model (modules_to_save for whole layers, bias='all' for "
            "biases), or save these parameters yourself",
            stacklevel=2,
        )


class RekeyCallback(TrainerCallback):  # type: ignore[misc]  # transformers leaves it untyped here
    """Renews secrets at the end of a `Trainer`'s step. Without it they are renewed at the beginning of the next.

    Example:
        >>> Trainer(model, args, train_dataset=data, callbacks=[obfuscatune.RekeyCallback()])
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Renew what is due."""
        protection = getattr(model, "protection", None)
        if protection is not None:
            protection.after_step()


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
