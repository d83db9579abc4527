"""Secret matrices that act on features: one interface (``base``); ``structured``, the default; ``dense``, the others.

``TransformSpec.parse("structured")`` -> ``.make(dim, stream)`` -> a ``Transform``
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.transforms.base import OrthogonalTransform, Transform, widen
from obfuscatune.enclave.transforms.dense import (
    ConditionedTransform,
    GaussianTransform,
    HaarTransform,
    Identity,
)
from obfuscatune.enclave.transforms.structured import StructuredTransform
from obfuscatune.errors import ConfigError

NAMES = ("structured", "haar", "gaussian", "conditioned(KAPPA)", "none", "identity")

_CONDITIONED = re.compile(r"conditioned\((\d+(?:\.\d+)?)\)")


@dataclass(frozen=True)
class TransformSpec:
    """Which transform: a name, and the condition number where the name takes one."""

    name: str
    kappa: float = 1.0

    @classmethod
    def parse(cls, text: str) -> TransformSpec:
        """Read ``structured``, ``haar``, ``gaussian``, ``conditioned(8)``, ``none`` or ``identity``.

        Raises:
            ConfigError: none of these.
        """
        if match := _CONDITIONED.fullmatch(text):
            return cls("conditioned", float(match[1]))
        if text in NAMES:
            return cls(text)
        raise ConfigError(f"unknown transform {text!r}; known are: {', '.join(NAMES)}")

    @property
    def is_unsafe(self) -> bool:
        """Whether it protects nothing, and is for controls alone; ``none`` is the same matrix, for a public base."""
        return self.name == "identity"

    def make(self, dim: int, stream: SecretStream) -> Transform:
        """Draw the secret matrix (dim, dim) from ``stream``."""
        match self.name:
            case "structured":
                return StructuredTransform(dim, stream)
            case "haar":
                return HaarTransform(dim, stream)
            case "gaussian":
                return GaussianTransform(dim, stream)
            case "conditioned":
                return ConditionedTransform(dim, stream, self.kappa)
            case "none" | "identity":
                return Identity(dim)
        raise ConfigError(f"unknown transform {self.name!r}")

    def __str__(self) -> str:
        return f"conditioned({self.kappa:g})" if self.name == "conditioned" else self.name


__all__ = ["NAMES", "OrthogonalTransform", "Transform", "TransformSpec", "widen"]
