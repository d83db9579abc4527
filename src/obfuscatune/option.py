"""What an option of a command is for, written once, in the annotation of the setting it gives.

    rounds: Annotated[int, Option("Counted rounds of each side.", least=1)] = 7

`cli/options.py` makes typer's options of such annotations, `worker/options.py` those of argparse. The option is named
after the setting, with dashes, and has the setting's default.
"""

from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from obfuscatune.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """The option's line in `--help`, and what else a command line needs to know."""

    help: str
    panel: str | None = None
    """The heading it stands under in the help."""
    unset: str | None = None
    """What the help calls a default of None: what a recipe, a profile or the machine makes of it."""
    name: str | None = None
    """The option's name, where it is not the setting's."""
    short: str | None = None
    """One letter for it, as "-o"."""
    variable: str | None = None
    """The environment variable that stands for it."""
    choices: tuple[str, ...] = ()
    """The values that a shell offers."""
    least: int | None = None
    most: int | None = None
    """The range of a number, both ends included."""
    read_as: type | None = None
    """What the command line reads it as, where that is not the setting's own type."""


def split_annotation(annotation: Any) -> tuple[Any, Option | None]:
    """The type and the `Option` of `Annotated[type, Option(...)]`; any other annotation as it is, and None."""
    if get_origin(annotation) is not Annotated:
        return annotation, None
    kind, *metadata = get_args(annotation)
    return kind, next((it for it in metadata if isinstance(it, Option)), None)


UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
"""Of sizes that people write."""


def parse_size(text: str) -> int:
    """Bytes from "8GiB", "512 MiB" or "1000000".

    Raises:
        ConfigError: anything else.
    """
    digits = text.rstrip("KMGTiB ")
    unit = text[len(digits) :].strip()
    if not digits.isascii() or not digits.isdigit() or unit not in UNITS:
        raise ConfigError(f"{text!r} is no size: write bytes, or a number with KiB, MiB, GiB or TiB, as 8GiB")
    return int(digits) * UNITS[unit]
