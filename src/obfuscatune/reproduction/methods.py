"""How a model is protected in a row of a table: a profile, and the knobs that make an ablation of it.

plain              no protection
enclave            everything in the enclave: nothing crosses
paper              the paper's scheme: orthogonal matrices, condition number 1
private            our default: both sides, mixing, LoRA in the enclave
gaussian           the paper's scheme with naive random matrices
conditioned(8)     the paper's scheme with matrices of that condition number
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from obfuscatune.enclave.profiles import PRESETS, resolve
from obfuscatune.enclave.transforms import TransformSpec
from obfuscatune.wire.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """A name, and what `protect` is told; `profile` is None where nothing is protected."""

    name: str
    profile: str | None
    knobs: Mapping[str, Any]

    @property
    def resolved(self) -> Mapping[str, Any] | None:
        """Every knob, as it stands in the settings of a cell."""
        return None if self.profile is None else asdict(resolve(self.profile, **self.knobs))

    @property
    def condition_number(self) -> float | None:
        """As far as it is chosen: None for `gaussian`, where it is whatever it happens to be, and for `plain`."""
        if self.profile is None or self.name == "gaussian":
            return None
        return TransformSpec.parse(resolve(self.profile, **self.knobs).transform).kappa


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name == "plain":
        return Method(name, None, {})
    if name in PRESETS:
        return Method(name, name, {})
    if name == "gaussian" or name.startswith("conditioned("):
        TransformSpec.parse(name)
        return Method(name, "paper", {"transform": name})
    known = ", ".join(["plain", *PRESETS, "gaussian", "conditioned(KAPPA)"])
    raise ConfigError(f"--methods: unknown method {name!r}; known are {known}")
