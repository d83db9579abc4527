"""Options that several commands share, each declared once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from obfuscatune.wire.errors import ConfigError


def option(name: str, text: str, *, default: str | None = None, panel: str | None = None) -> Any:
    """A typer option.

    Args:
        default: What to call the default in the help, where it is settled further in (a recipe, a profile).
        panel: The heading it stands under in the help.
    """
    # Typer puts a default that is given as text in brackets of its own; this looks like those that it finds itself.
    told = "" if default is None else rf" [dim]\[default: {default}][/dim]"
    return typer.Option(name, help=text + told, show_default=False, rich_help_panel=panel)


_PROTECTION = "Protection"

Model = Annotated[str | None, option("--model", "Model directory or Hub name.", default="the embedded model")]
Adapter = Annotated[Path | None, option("--adapter", "Directory of a LoRA adapter in PEFT's format.")]
Dtype = Annotated[str | None, option("--dtype", "float32, bfloat16 or float64.", default="float32")]
Plain = Annotated[bool, option("--plain", "Run unprotected, for comparison.", panel=_PROTECTION)]
Worker = Annotated[
    str | None,
    option(
        "--worker",
        "Address of a running worker: unix:PATH or tcp:HOST:PORT.",
        default="starts one on this machine",
        panel=_PROTECTION,
    ),
]
Profile = Annotated[
    str | None, option("--profile", "What to hide, and how well.", default="private", panel=_PROTECTION)
]
FirstBlocks = Annotated[
    int | None,
    option(
        "--first-blocks",
        "How many of the first blocks stay in the enclave.",
        default="the profile's",
        panel=_PROTECTION,
    ),
]
KeyFile = Annotated[
    Path | None,
    option(
        "--key-file",
        "Root key of the transforms, made if missing.",
        default="a fresh key, then forgotten",
        panel=_PROTECTION,
    ),
]
TlsCert = Annotated[Path | None, option("--tls-cert", "This enclave's certificate.", panel=_PROTECTION)]
TlsKey = Annotated[Path | None, option("--tls-key", "Its private key.", panel=_PROTECTION)]
Peer = Annotated[Path | None, option("--peer", "The certificate the worker must show.", panel=_PROTECTION)]
Fields = Annotated[
    str | None, option("--fields", "Which columns hold what: prompt=question,completion=answer.", panel="Data")
]
AsJson = Annotated[bool, option("--json", "Print one JSON document on stdout, and nothing else.")]


def columns(text: str | None) -> dict[str, str] | None:
    """`--fields prompt=question,completion=answer` as a mapping.

    Raises:
        ConfigError: it is not of that form.
    """
    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name.strip() and column.strip() for name, _, column in pairs):
        raise ConfigError(f"--fields: expected FIELD=COLUMN, comma between, found {text!r}")
    return {name.strip(): column.strip() for name, _, column in pairs}
