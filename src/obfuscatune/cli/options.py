"""From annotations to typer's options; and the options that several commands share, each declared once."""

import os
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from obfuscatune.errors import ConfigError
from obfuscatune.option import Option, split_annotation

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
    "mask_worker": "OBFUSCATUNE_MASK_WORKER",
    "mask_peer": "OBFUSCATUNE_MASK_PEER",
}
"""Options whose value, where the command line has none, is taken from a variable of the environment."""

PROFILES = ("private", "guarded", "paper", "enclave")
"""Names that a shell completes; a profile itself is looked up by `enclave/profiles.py`, whose import takes long."""
DTYPES = ("float32", "bfloat16", "float64")
PROTECTION = "Protection"
"""A heading of the help."""

Model = Annotated[
    str | None, Option("Model directory or Hub name.", unset="the embedded model", variable=ENVIRONMENT["model"])
]
Adapter = Annotated[Path | None, Option("Directory of a LoRA adapter in PEFT's format.")]
Dtype = Annotated[
    str | None,
    Option("float32, bfloat16 or float64.", unset="float32", variable=ENVIRONMENT["dtype"], choices=DTYPES),
]
Profile = Annotated[
    str | None,
    Option(
        "What to hide, and how well.",
        PROTECTION,
        unset="private",
        variable=ENVIRONMENT["profile"],
        choices=PROFILES,
    ),
]
Base = Annotated[
    str | None,
    Option(
        "closed: the base model's weights were never public. public: they are.",
        PROTECTION,
        unset="looks for signs of it",
        variable=ENVIRONMENT["base"],
        choices=("closed", "public"),
    ),
]
FirstBlocks = Annotated[
    int | None, Option("How many of the first blocks stay in the enclave.", PROTECTION, unset="the profile's")
]
AsJson = Annotated[bool, Option("Print one JSON document on stdout, and nothing else.", name="json")]


def said_by_environment(name: str, value: object) -> bool:
    """Whether an option's value is the one that the environment gives it."""
    variable = ENVIRONMENT.get(name)
    return variable is not None and value is not None and os.environ.get(variable) == str(value)


def check_dtype(dtype: str | None) -> str:
    """The name of a dtype, float32 if None.

    Raises:
        ConfigError: it is none of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(DTYPES)}, found {dtype}")
    return dtype or "float32"


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it, with an option for each parameter that is annotated with an `Option`.

    A parameter whose type is a dataclass of such fields stands for an option for each of them, and so does one whose
    type has `option_parameters()`; the command is given an object of that type, made of their values by name.
    """
    groups: dict[str, tuple[type, list[str]]] = {}
    shown: list[Parameter] = []
    for parameter in signature(command, eval_str=True).parameters.values():
        members = _members(parameter.annotation)
        if members is not None:
            groups[parameter.name] = parameter.annotation, [member.name for member in members]
        shown += [parameter] if members is None else members

    @wraps(command)
    def called(**given: Any) -> None:
        for name, (group, members) in groups.items():
            given[name] = group(**{member: given.pop(member) for member in members})
        command(**given)

    parameters = [_for_typer(parameter) for parameter in shown]
    called.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]  # typer's
    return called


def _members(group: Any) -> list[Parameter] | None:
    """The parameters that a group of options stands for; None for any other type."""
    if hasattr(group, "option_parameters"):
        return list(group.option_parameters())
    if not (isinstance(group, type) and is_dataclass(group)):
        return None
    hints = get_type_hints(group, include_extras=True)
    defaults = {it.name: Parameter.empty if it.default is MISSING else it.default for it in fields(group)}
    return [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, default in defaults.items()
        if split_annotation(hints[name])[1] is not None
    ]


def _for_typer(parameter: Parameter) -> Parameter:
    """With typer's own option in the annotation; one that has no `Option` is left as it is."""
    kind, option = split_annotation(parameter.annotation)
    if option is None:
        return parameter.replace(kind=Parameter.KEYWORD_ONLY)
    # Typer puts a default that is given as text in brackets of its own; this looks like those that it finds itself.
    told = option.unset or told_default(parameter.default)
    made = typer.Option(
        f"--{(option.name or parameter.name).replace('_', '-')}",
        help=option.help + ("" if told is None else rf" [dim]\[default: {told}][/dim]"),
        show_default=False,
        rich_help_panel=option.panel,
        envvar=option.variable,
        autocompletion=(lambda: list(option.choices)) if option.choices else None,
        min=option.least,
        max=option.most,
    )
    read: Any = option.read_as or kind
    return parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=Annotated[read, made])


def told_default(default: Any) -> str | None:
    """A default as the help shows it; None where there is none to show."""
    if default is Parameter.empty or default is None or isinstance(default, bool | dict):
        return None
    return f"{default:g}" if isinstance(default, float) else str(default)
