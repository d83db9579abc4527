"""Options that several commands share, each declared once, and the environment variables that stand for them."""

import os
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from obfuscatune.tuning.names import ALIASES
from obfuscatune.wire.errors import ConfigError

ENVIRONMENT = {
    "model": "OBFUSCATUNE_MODEL",
    "dtype": "OBFUSCATUNE_DTYPE",
    "base": "OBFUSCATUNE_BASE",
    "worker": "OBFUSCATUNE_WORKER",
    "profile": "OBFUSCATUNE_PROFILE",
    "key_file": "OBFUSCATUNE_KEY_FILE",
    "tls_cert": "OBFUSCATUNE_TLS_CERT",
    "tls_key": "OBFUSCATUNE_TLS_KEY",
    "peer": "OBFUSCATUNE_PEER",
}
"""Options whose value, where the command line has none, is taken from a variable of the environment."""

PROFILES = ("private", "guarded", "paper", "enclave")
"""Names that a shell completes; a profile itself is looked up by `enclave/profiles.py`, whose import takes long."""


def option(
    name: str,
    text: str,
    *,
    default: str | None = None,
    panel: str | None = None,
    envvar: str | None = None,
    complete: Callable[[], list[str]] | None = None,
) -> Any:
    """A typer option.

    Args:
        default: What to call the default in the help, where it is settled further in (a recipe, a profile).
        panel: The heading it stands under in the help.
        envvar: The variable of the environment that stands for it.
        complete: The values that a shell offers.
    """
    # Typer puts a default that is given as text in brackets of its own; this looks like those that it finds itself.
    told = "" if default is None else rf" [dim]\[default: {default}][/dim]"
    return typer.Option(
        name,
        help=text + told,
        show_default=False,
        rich_help_panel=panel,
        envvar=envvar,
        autocompletion=complete,
    )


def said_by_environment(name: str, value: object) -> bool:
    """Whether an option's value is the one that the environment gives it."""
    variable = ENVIRONMENT.get(name)
    return variable is not None and value is not None and os.environ.get(variable) == str(value)


def with_known_names(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a hidden option for each of `names.ALIASES`.

    What these options are given reaches the command as `known_names`, by name.
    """

    @wraps(command)
    def called(**given: Any) -> None:
        known = {name: value for name in ALIASES if (value := given.pop(name)) is not None}
        command(**given, known_names=known)

    own = signature(command)
    shown = [parameter for parameter in own.parameters.values() if parameter.name != "known_names"]
    hidden = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=_hidden_option(name)) for name in ALIASES
    ]
    called.__signature__ = own.replace(parameters=[*shown, *hidden])  # type: ignore[attr-defined]  # typer reads it
    return called


def _hidden_option(name: str) -> Any:
    return Annotated[str | None, typer.Option(f"--{name.replace('_', '-')}", hidden=True)]


_PROTECTION = "Protection"

Model = Annotated[
    str | None,
    option("--model", "Model directory or Hub name.", default="the embedded model", envvar=ENVIRONMENT["model"]),
]
Base = Annotated[
    str | None,
    option(
        "--base",
        "closed: the base model's weights were never public. public: they are.",
        default="looks for signs of it",
        panel=_PROTECTION,
        envvar=ENVIRONMENT["base"],
        complete=lambda: ["closed", "public"],
    ),
]
Adapter = Annotated[Path | None, option("--adapter", "Directory of a LoRA adapter in PEFT's format.")]
Dtype = Annotated[
    str | None,
    option(
        "--dtype",
        "float32, bfloat16 or float64.",
        default="float32",
        envvar=ENVIRONMENT["dtype"],
        complete=lambda: ["float32", "bfloat16", "float64"],
    ),
]
Plain = Annotated[bool, option("--plain", "Run unprotected, for comparison.", panel=_PROTECTION)]
Worker = Annotated[
    str | None,
    option(
        "--worker",
        "Address of a running worker: unix:PATH or tcp:HOST:PORT.",
        default="starts one on this machine",
        panel=_PROTECTION,
        envvar=ENVIRONMENT["worker"],
    ),
]
Profile = Annotated[
    str | None,
    option(
        "--profile",
        "What to hide, and how well.",
        default="private",
        panel=_PROTECTION,
        envvar=ENVIRONMENT["profile"],
        complete=lambda: list(PROFILES),
    ),
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
        envvar=ENVIRONMENT["key_file"],
    ),
]
TlsCert = Annotated[
    Path | None,
    option("--tls-cert", "This enclave's certificate.", panel=_PROTECTION, envvar=ENVIRONMENT["tls_cert"]),
]
TlsKey = Annotated[
    Path | None, option("--tls-key", "Its private key.", panel=_PROTECTION, envvar=ENVIRONMENT["tls_key"])
]
Peer = Annotated[
    Path | None,
    option("--peer", "The certificate the worker must show.", panel=_PROTECTION, envvar=ENVIRONMENT["peer"]),
]
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
