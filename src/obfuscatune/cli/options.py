"""Makes typer's options of `Option` annotations, and declares the options that several commands share."""

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
    "provider_adapter": "OBFUSCATUNE_PROVIDER_ADAPTER",
    "worker": "OBFUSCATUNE_WORKER",
    "fleet": "OBFUSCATUNE_FLEET",
    "profile": "OBFUSCATUNE_PROFILE",
    "key_file": "OBFUSCATUNE_KEY_FILE",
    "tls_cert": "OBFUSCATUNE_TLS_CERT",
    "tls_key": "OBFUSCATUNE_TLS_KEY",
    "peer": "OBFUSCATUNE_PEER",
    "mask_worker": "OBFUSCATUNE_MASK_WORKER",
    "mask_peer": "OBFUSCATUNE_MASK_PEER",
}
"""Options that an environment variable sets when the command line does not."""

PROFILES = ("private", "guarded", "paper", "enclave")
"""Names for shell completion. Not taken from `enclave/profiles.py`, because its import takes seconds."""
DTYPES = ("float32", "bfloat16", "float64")
PROTECTION = "Protection"
"""Heading in the help for the options of `Protection`."""

Model = Annotated[
    str | None, Option("Model directory or Hub name.", unset="the embedded model", variable=ENVIRONMENT["model"])
]
Adapter = Annotated[Path | None, Option("Directory of a LoRA adapter in PEFT's format.")]
ProviderAdapter = Annotated[
    Path | None,
    Option(
        "The provider's LoRA adapter, as ./provider-adapter: frozen under the owner's, it stays in the enclave.",
        variable=ENVIRONMENT["provider_adapter"],
    ),
]
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
PublicBase = Annotated[
    bool,
    Option(
        "The model's weights are published themselves: under --profile guarded workers multiply by them as they are, "
        "and one started with --serve-model needs none sent.",
        PROTECTION,
    ),
]
FirstBlocks = Annotated[
    int | None, Option("How many of the first blocks stay in the enclave.", PROTECTION, unset="the profile's")
]
TlsCert = Annotated[Path | None, Option("This enclave's certificate.", PROTECTION, variable=ENVIRONMENT["tls_cert"])]
TlsKey = Annotated[Path | None, Option("Its private key.", PROTECTION, variable=ENVIRONMENT["tls_key"])]
MaskPeer = Annotated[
    Path | None,
    Option("The certificate the mask worker must show.", PROTECTION, variable=ENVIRONMENT["mask_peer"]),
]
AsJson = Annotated[bool, Option("Print one JSON document on stdout, and nothing else.", name="json")]


def is_from_environment(name: str, value: object) -> bool:
    """Whether `value` is what the environment variable of the option `name` holds."""
    variable = ENVIRONMENT.get(name)
    return variable is not None and value is not None and os.environ.get(variable) == str(value)


def check_dtype(dtype: str | None) -> str:
    """Returns the value of --dtype if it is one of `DTYPES`, and "float32" if it is None.

    Raises:
        ConfigError: the value is none of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(DTYPES)}, found {dtype}")
    return dtype or "float32"


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command for typer, which sees one option for each parameter that is annotated with an `Option`.

    A parameter may also be a group of options. Its type is a dataclass with annotated fields, or has a static method
    `option_parameters()`. Typer sees the options one by one; the command gets one object of that type.
    """
    groups: dict[str, tuple[type, list[str]]] = {}
    flat: list[Parameter] = []
    for parameter in signature(command, eval_str=True).parameters.values():
        members = _members(parameter.annotation)
        if members is not None:
            groups[parameter.name] = parameter.annotation, [member.name for member in members]
        flat += [parameter] if members is None else members

    @wraps(command)
    def wrapped(**values: Any) -> None:
        for name, (group, members) in groups.items():
            values[name] = group(**{member: values.pop(member) for member in members})
        command(**values)

    parameters = [_for_typer(parameter) for parameter in flat]
    wrapped.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]  # for typer
    return wrapped


def _members(group: Any) -> list[Parameter] | None:
    """The options of a group (see `with_options`) as parameters; None if the type is not a group."""
    if hasattr(group, "option_parameters"):
        return list(group.option_parameters())
    if not (isinstance(group, type) and is_dataclass(group)):
        return None
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
        if split_annotation(hints[field.name])[1] is not None
    ]


def _for_typer(parameter: Parameter) -> Parameter:
    """The parameter with its `Option` replaced by typer's; without an `Option` it keeps its annotation."""
    kind, option = split_annotation(parameter.annotation)
    if option is None:
        return parameter.replace(kind=Parameter.KEYWORD_ONLY)
    # In the form in which typer shows a default that it finds itself: show_default=TEXT would add parentheses.
    default = option.unset or default_text(parameter.default)
    typer_option = typer.Option(
        f"--{(option.name or parameter.name).replace('_', '-')}",
        *([option.short] if option.short else []),
        help=option.help + ("" if default is None else rf" [dim]\[default: {default}][/dim]"),
        show_default=False,
        rich_help_panel=option.panel,
        envvar=option.variable,
        autocompletion=(lambda: list(option.choices)) if option.choices else None,
        min=option.least,
        max=option.most,
    )
    read_as: Any = option.read_as or kind
    return parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=Annotated[read_as, typer_option])


def default_text(default: Any) -> str | None:
    """A default value as the help shows it; None if the help shows none."""
    if default is Parameter.empty or default is None or isinstance(default, bool | dict):
        return None
    return f"{default:g}" if isinstance(default, float) else str(default)
