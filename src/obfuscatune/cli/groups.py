"""Commands that have commands of their own: `provider`, `owner`."""

from collections.abc import Callable

import typer

from obfuscatune.cli.options import with_options


def command_group(name: str, help_text: str) -> typer.Typer:
    """A typer app for a group of commands, which shows its help when it is called without one."""
    group = typer.Typer(name=name, help=help_text, no_args_is_help=True, add_completion=False)
    group.callback()(_nothing)  # with a callback, typer keeps a group of one command a group
    return group


def command_of(
    group: typer.Typer, *examples: str, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as a command of the group, by its name with dashes, with the examples below its help."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        epilog = "\n\n".join(f"Example: {it}" for it in examples)
        help_text = "\n\n".join(" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n"))
        group.command(name or function.__name__.replace("_", "-"), help=help_text, epilog=epilog)(
            with_options(function)
        )
        return function

    return register


def _nothing() -> None:
    """Runs before each command of a group."""
