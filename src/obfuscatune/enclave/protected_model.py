"""Methods that a protected model has in the place of its own, or besides them.

`with`, transformers and `Trainer` look methods up on the class. So an object's class becomes a subclass of its own, of
the same name, with a mixin before it (`extend`); no method of an object is replaced, and no class of anybody else.
"""

from __future__ import annotations

import functools
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from obfuscatune.enclave.layers import elements_on_worker
from obfuscatune.errors import ProtectionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object


def extend(module: nn.Module, mixin: type) -> None:
    """Have the methods of `mixin` precede those of the module's class. Twice is once."""
    if not isinstance(module, mixin):
        kind: Any = type(module)
        module.__class__ = _extended(kind, mixin)


@functools.cache
def _extended(kind: Any, mixin: type) -> Any:
    same = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (mixin, kind), same)


class Closable:
    """What was protected, PEFT's wrapper or the model itself: `with load(path) as model:` and `model.close()`."""

    protection: Any
    """A `Protection`."""

    def close(self) -> None:
        """Have the worker forget the model, and end it where it was started for it. Twice is once.

        The model cannot compute afterwards: it raises ProtectionError.
        """
        self.protection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ProtectedModel(Closable, _Model):  # type: ignore[misc]  # transformers leaves it untyped
    """A model of transformers: counts what is on the worker, and refuses to save or train what it cannot."""

    _has_warned = False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the adapters that `add_adapter` added.

        Raises:
            ProtectionError: there are none.
        """
        if not getattr(self, "_hf_peft_config_loaded", False):
            raise ProtectionError(
                "a protected model cannot be saved: its large matrices are not in this process. Save an adapter: "
                "add one with peft.get_peft_model and call save_pretrained on that, or with model.add_adapter"
            )
        super().save_pretrained(*args, **kwargs)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers counts, with what is on the worker."""
        here: int = super().num_parameters(only_trainable, exclude_embeddings)
        return here if only_trainable else here + elements_on_worker(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch has it. `Trainer` calls it before its first step, and would fail at its first checkpoint.

        Raises:
            ProtectionError: the model has no adapter.
        """
        if not has_adapter(self):
            raise ProtectionError(
                "a protected model without an adapter cannot be trained by Trainer: its base is frozen, and "
                "save_pretrained could not save it. Add an adapter with peft.get_peft_model or model.add_adapter; "
                "in a loop of your own call zero_grad of the optimizer"
            )
        super().zero_grad(set_to_none)

    def train(self, mode: bool = True) -> Self:
        """As torch has it; warns once where nothing can be trained."""
        if mode and not (self._has_warned or has_adapter(self) or any(p.requires_grad for p in self.parameters())):
            self._has_warned = True
            warnings.warn(
                "nothing of this protected model is trainable: its base weights are frozen, and it has no adapter. "
                "Add one with peft.get_peft_model or model.add_adapter",
                stacklevel=2,
            )
        super().train(mode)
        return self


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT put layers of its own into the model."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())
