"""A protected model closes: `with load(path) as model:` and `model.close()`."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any, Self

from torch import nn


class Closable:
    """What the class of a protected model has besides its own methods."""

    def close(self) -> None:
        """Have the worker forget the model, and end it where it was started for it. Twice is once.

        The model cannot compute afterwards: it raises ProtectionError.
        """
        protection: Any = self.protection  # type: ignore[attr-defined]  # adopt hung it on the model
        protection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_closable(model: nn.Module) -> None:
    """Give a model `close` and `with`: its class becomes a subclass of its own, of the same name.

    Python looks up `with`'s methods on the class alone, so an attribute of the model would not do.
    """
    if not isinstance(model, Closable):
        kind: Any = type(model)
        model.__class__ = _closable(kind)


@functools.cache
def _closable(kind: Any) -> Any:
    same = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, Closable), same)
