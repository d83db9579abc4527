"""A protected model under training: it notices the optimizer's steps, and says what comes to nothing.

    forward pass  ->  first protected layer  ->  TrainingWatch: did the trained parameters change since the last pass?
                                             ->  Protection.after_step: re-key what is due

Nobody has to tell it: whichever loop or optimizer trains the model, it changes parameters. (Their versions do not tell:
fused optimizers leave them as they are.)
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from obfuscatune.enclave.modules import elements_on_worker
from obfuscatune.enclave.protection import Protection
from obfuscatune.wire.errors import ProtectionError


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


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT put layers of its own into the model."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


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


def answer_for(model: PreTrainedModel) -> None:
    """Have a protected model's own methods count what is on the worker, and refuse to save or train what they cannot.

    Set on this one model, which they hold weakly.
    """
    own: Any = weakref.proxy(model)
    own_ref = weakref.ref(model)
    kind = type(model)

    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        if not getattr(own, "_hf_peft_config_loaded", False):
            raise ProtectionError(
                "a protected model cannot be saved: its large matrices are not in this process. Save an adapter: "
                "add one with peft.get_peft_model and call save_pretrained on that, or with model.add_adapter"
            )
        kind.save_pretrained(own, *args, **kwargs)

    def num_parameters(only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        here: int = kind.num_parameters(own, only_trainable, exclude_embeddings)
        return here if only_trainable else here + elements_on_worker(own)

    def zero_grad(set_to_none: bool = True) -> None:
        if not has_adapter(own):  # `Trainer` does this before its first step, and would fail at its first checkpoint
            raise ProtectionError(
                "a protected model without an adapter cannot be trained by Trainer: its base is frozen, and "
                "save_pretrained could not save it. Add an adapter with peft.get_peft_model or model.add_adapter; "
                "in a loop of your own call zero_grad of the optimizer"
            )
        kind.zero_grad(own, set_to_none)

    has_warned = False

    def train(mode: bool = True) -> PreTrainedModel:
        nonlocal has_warned
        if mode and not (has_warned or has_adapter(own) or any(p.requires_grad for p in own.parameters())):
            has_warned = True
            warnings.warn(
                "nothing of this protected model is trainable: its base weights are frozen, and it has no adapter. "
                "Add one with peft.get_peft_model or model.add_adapter",
                stacklevel=2,
            )
        kind.train(own, mode)
        return own_ref()

    model.save_pretrained, model.num_parameters = save_pretrained, num_parameters
    model.zero_grad, model.train = zero_grad, train


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
