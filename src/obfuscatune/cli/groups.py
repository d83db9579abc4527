"""Commands that have commands of their own: `bench`, `fleet`, `provider`, `owner`."""

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
        command = group.command(name or function.__name__.replace("_", "-"), help=help_of(function), epilog=epilog)
        command(with_options(function))
        return function

    return register


def help_of(command: Callable[..., None]) -> str:
    """A command's docstring with its paragraphs in one line each, for the terminal to break where it ends."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (command.__doc__ or "").split("\n\n"))


def _nothing() -> None:
    """Runs before each command of a group."""
