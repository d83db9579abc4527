"""Does a model look like a fine-tune of a published one? Then `private` hides its text less than users may think.

A worker that has the published weights aligns them with what it was sent and learns the secret bases; from there it
names tokens (docs/threat-model.md, "A public base"). Whether the base is public nobody can see for sure, so this
looks for signs and gives advice; `base="closed"` or `base="public"` settles it.
"""

from __future__ import annotations

import functools
import json
import re
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from obfuscatune.enclave.profiles import Profile
from obfuscatune.errors import ConfigError

Base = Literal["closed", "public"]
_FAMILIES = Path(__file__).with_name("published_families.toml")
_ROOM_ABOVE = 256
"""Tokens that a fine-tune may have more than its family: added ones, and padding."""
_LARGEST_FILE = 1 << 20
"""Bytes; a card or configuration beyond that is not read."""
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_KEYS = ("base_model", "base_model_name_or_path", "_name_or_path")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z")


class PublicBaseWarning(UserWarning):
    """The model looks like a fine-tune of a published one, whose tokens this profile does not hide."""


def warn_of_public_base(
    base: Base | None, profile: Profile, config: Any, directory: Path | None = None, *, stacklevel: int
) -> None:
    """A `PublicBaseWarning` where there is a reason for it.

    Args:
        stacklevel: of `warnings.warn`, counted from the caller of this function.

    Raises:
        ConfigError: `base` is neither None, "closed" nor "public", or contradicts the profile.
    """
    advice = public_base_advice(base, profile, config, directory, closed='base="closed"')
    if advice is not None:
        warnings.warn(advice, PublicBaseWarning, stacklevel=stacklevel + 1)


def public_base_advice(
    base: str | None, profile: Profile, config: Any, directory: Path | None = None, *, closed: str
) -> str | None:
    """What to tell the user of a model; None where there is no sign of a public base, or nothing is to be seen.

    Under masks the published weights tell a worker nothing of the text. Nothing is said of profile `paper` either: it
    is there to be compared with, and hides less than this anyway.

    Args:
        base: what the user says of it.
        config: the model's configuration.
        directory: of the model's files, for its card.
        closed: how the user says that the base was never public.

    Raises:
        ConfigError: `base` is neither None, "closed" nor "public", or contradicts the profile.
    """
    if base not in (None, "closed", "public"):
        raise ConfigError(f"base: expected closed or public, found {base!r}")
    if base == "closed" and profile.public_base:
        raise ConfigError("base='closed' says that the weights are not published, public_base=True that they are")
    if base == "closed" or not profile.offload or profile.masks or profile.is_as_published:
        return None
    sign = "the base model is public" if base == "public" else sign_of_published(config, directory)
    if sign is None:
        return None
    return (
        f"{sign}: under profile {profile.name}, a worker that has the published weights can name tokens of the text. "
        f"Profile guarded hides them, with two workers in different hands (docs/threat-model.md). {closed} says that "
        "the base model's weights were never public"
    )


def sign_of_published(config: Any, directory: Path | None = None) -> str | None:
    """The first sign that a model is a fine-tune of a published one, as a clause; None without any."""
    for file, name in _named_bases(directory) if directory is not None else ():
        return f"this looks like a fine-tune of {name}, which its {file} names"
    for part in (config, config.get_text_config()):
        family = _family(getattr(part, "model_type", None), getattr(part, "vocab_size", None))
        if family is not None:
            return (
                f"this looks like a fine-tune of {family}, whose architecture ({part.model_type}) and vocabulary "
                f"({part.vocab_size} tokens) it has"
            )
    return None


def _named_bases(directory: Path) -> Iterator[tuple[str, str]]:
    """Which file names which base model. What cannot be read says nothing: whoever needs the file will complain."""
    for file in ("README.md", "config.json", "adapter_config.json"):
        fields = _fields(directory / file)
        for key in _KEYS:
            value = fields.get(key)
            for name in value if isinstance(value, list) else [value]:
                # A path, as of a checkpoint before this one, tells of no publication.
                if isinstance(name, str) and _HUB_ID.match(name) and not Path(name).exists():
                    yield file, name


def _fields(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_FILE:
            return {}
        text = path.read_text("utf-8")
        if path.suffix == ".md":
            found = _FRONT_MATTER.match(text)
            fields = yaml.safe_load(found[1]) if found else {}
        else:
            fields = json.loads(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _family(model_type: str | None, vocab_size: int | None) -> str | None:
    if not isinstance(vocab_size, int):
        return None
    for family in families():
        sizes = family["vocab_sizes"]
        if model_type in family["model_types"] and any(0 <= vocab_size - size < _ROOM_ABOVE for size in sizes):
            return str(family["name"])
    return None


@functools.cache
def families() -> tuple[dict[str, Any], ...]:
    """The table of published families: name, model_types, vocab_sizes."""
    return tuple(tomllib.loads(_FAMILIES.read_text("utf-8"))["family"])
