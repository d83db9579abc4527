"""Which profiles are audited: presets by name, single knobs changed, and controls that protect little or nothing.

private                    the preset
private:first_blocks=0     the same with a knob changed
identity, rotation         unsafe controls, on which attacks must succeed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from obfuscatune.enclave.profiles import PRESETS, Profile, resolve
from obfuscatune.wire.errors import ConfigError

_BARE = {"mixing": False, "shield_rows": 0, "first_blocks": 0}
CONTROLS: dict[str, dict[str, Any]] = {
    "identity": {**_BARE, "transform": "identity"},
    "rotation": _BARE,
}
"""Of `private`: everything in the clear; one static rotation and nothing else."""


@dataclass(frozen=True)
class Variant:
    """A profile under the name that it was asked for by."""

    name: str
    profile: Profile


def default_names() -> list[str]:
    """Every preset that sends anything, and the controls."""
    presets = [name for name, profile in PRESETS.items() if profile.offload]
    return [*presets, "private:first_blocks=0", *CONTROLS]


def parse_variants(text: str) -> list[Variant]:
    """Read `NAME[:KNOB=VALUE]...[,NAME...]`.

    Raises:
        ConfigError: no such profile or knob, a value out of its range, or a profile that sends nothing.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError("--profile: expected names of profiles with commas between them")
    return [_parse(name) for name in names]


def _parse(name: str) -> Variant:
    preset, *settings = name.split(":")
    if preset in CONTROLS:
        knobs: dict[str, Any] = {**CONTROLS[preset], "allow_unsafe": True}
        preset = "private"
    else:
        knobs = {"allow_unsafe": True} if settings else {}
    profile = resolve(":".join([preset, *settings]), **knobs)
    if not profile.offload:
        raise ConfigError(f"--profile {name}: it sends nothing to a worker, there is nothing to audit")
    return Variant(name, profile)
