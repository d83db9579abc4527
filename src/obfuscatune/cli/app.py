"""`obfuscatune`: finds the command, runs it, and turns what goes wrong into one line and an exit code."""

import os
import sys
import traceback
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from obfuscatune.cli.groups import command_of
from obfuscatune.cli.options import ENVIRONMENT
from obfuscatune.cli.output import settle_streams
from obfuscatune.errors import ConfigError, ObfuscaTuneError
from obfuscatune.machine import refusal
from obfuscatune.process import settle_process
from obfuscatune.version import __version__

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# typer exports BadParameter alone; its base is that of all usage errors, whether typer brings click or imports it.
_UsageError: Any = typer.BadParameter.__bases__[0]

_PREFIX = "OBFUSCATUNE_"
_VARIABLES = (*ENVIRONMENT.values(), "OBFUSCATUNE_DEBUG", "OBFUSCATUNE_KERNELS")
_OF_SERVICE = {
    *("OpenSSL", "dcap_qvl", "fastapi", "starlette", "uvicorn", "sqlalchemy", "prometheus_client"),
    *("python_multipart", "httpx", "fsspec"),
}
"""Modules of the packages that the extra `service` brings."""


class _Command(NamedTuple):
    summary: str
    example: str


_COMMANDS = {
    "demo": _Command("See it work: the embedded model learns private notes.", "obfuscatune demo"),
    "finetune": _Command(
        "Fine-tune a model with LoRA.", "obfuscatune finetune --model ./llama --data train.jsonl --out runs/notes"
    ),
    "generate": _Command(
        "Continue a prompt.", 'obfuscatune generate --adapter runs/notes/adapter --prompt "Once upon a time"'
    ),
    "chat": _Command("Talk with a model.", "obfuscatune chat --model ./llama --adapter runs/notes/adapter"),
    "evaluate": _Command(
        "Measure how many questions a model answers right.",
        "obfuscatune evaluate --task sciq --data-dir data --limit 200 --compare-plain",
    ),
    "lm-eval": _Command(
        "Run lm-evaluation-harness on a protected model.",
        "obfuscatune lm-eval run --model obfuscatune --model_args pretrained=./llama --tasks sciq",
    ),
    "inspect": _Command("Show where each layer runs and what crosses.", "obfuscatune inspect --model ./llama"),
    "advise": _Command(
        "Say what to expect on this machine, with these workers.",
        "obfuscatune advise --shape llama-3.1-8b --work decode --batch 8 --worker tcp:10.0.0.2:7600",
    ),
    "bench": _Command("Time a protected step beside a plain one.", "obfuscatune bench step"),
    "reproduce": _Command(
        "Make the paper's tables anew.", "obfuscatune reproduce --preset cpu --data-root data --out reproduce-out"
    ),
    "audit": _Command(
        "Measure what a worker learns.", "obfuscatune audit --model ./llama --profile private --attacker closed"
    ),
    "serve": _Command("Run the attested service.", "obfuscatune serve --config service.yaml"),
    "verify-log": _Command("Verify a service's audit log.", "obfuscatune verify-log audit.jsonl --key 4f2c…"),
    "verify-receipt": _Command(
        "Verify the receipt of a job.", "obfuscatune verify-receipt receipt.json --policy policy.yaml"
    ),
    "worker": _Command("Run the untrusted worker.", "obfuscatune worker --listen unix:/run/obfuscatune.sock"),
    "fleet": _Command(
        "Run workers on many machines, and publish who they are.",
        "obfuscatune fleet up --engine ray --workers 8 --peer enclave-cert.pem --state fleet/",
    ),
    "provider": _Command(
        "Seal a model, and release its key to an enclave you checked.",
        "obfuscatune provider seal ./llama -o bundle/ --identity keys",
    ),
    "owner": _Command(
        "Seal data, and use a service that you have checked.",
        "obfuscatune owner seal train.jsonl -o bundle/ --identity keys",
    ),
    "verify": _Command(
        "Hold evidence against a policy.",
        "obfuscatune verify evidence.json --policy policy.yaml --out verified.json",
    ),
    "keygen": _Command(
        "Make the keys of a party: enclave, worker, provider or owner.", "obfuscatune keygen --out keys/enclave"
    ),
}
"""Each is the function, or the typer app, of its own name in the module of its own name; `-` is `_` there."""


class _LazyGroup(TyperGroup):
    """Knows all commands by name and summary, and imports the module of the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = _with_dashes(args[0]) if args else ""
        if name in _COMMANDS:
            self.commands[name] = _import_command(name)
        return super().resolve_command(ctx, args)


def _import_command(name: str) -> Any:
    module = name.replace("-", "_")
    found = getattr(import_module(f"obfuscatune.cli.{module}"), module)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    app = typer.Typer(add_completion=False)
    command_of(app, _COMMANDS[name].example, name=name)(found)
    return typer.main.get_command(app)


def _with_dashes(name: str) -> str:
    """Options and commands may be typed with `_`, as they are spelt in Python and in run files."""
    return name.replace("_", "-")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"obfuscatune {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Say which version."),
) -> None:
    """Fine-tune and run a language model on hardware that learns neither model nor text."""


def make_app() -> Any:
    """The command line as typer runs it; no command's module is imported yet."""
    app = typer.Typer(cls=_LazyGroup, no_args_is_help=True, context_settings={"token_normalize_func": _with_dashes})
    app.callback(
        epilog="Each command has its own --help, which names the environment variables that stand for options. "
        "With --debug, or OBFUSCATUNE_DEBUG=1, errors show a traceback."
    )(_root)
    group: Any = typer.main.get_command(app)
    group.commands.update({name: TyperCommand(name, help=it.summary) for name, it in _COMMANDS.items()})
    return group


def main() -> None:
    """The console script."""
    settle_streams()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    if line := refusal():
        _say(f"error: {line}")
        return EXIT_USAGE
    settle_process()
    _prepare_libraries()
    _warn_of_unknown_variables()
    debug = "--debug" in arguments or os.environ.get("OBFUSCATUNE_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        # Without standalone mode, typer raises what it would else print, and returns an Exit's code.
        code = int(make_app()(arguments, prog_name="obfuscatune", standalone_mode=False) or 0)
        if code == EXIT_INTERRUPTED:  # so typer reports Ctrl-C; older ones raise Abort
            raise KeyboardInterrupt
        return code
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone, which is theirs to do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
        else:
            _say(f"error: {error.format_message().removesuffix('.')}; --help says what there is")
        return EXIT_USAGE
    except ObfuscaTuneError as error:
        if debug:
            traceback.print_exc()
        _say(f"error: {error}")
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILURE
    except Exception as error:  # noqa: BLE001  the last stop: a user gets one line whatever it is
        if debug:
            traceback.print_exc()
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing in _OF_SERVICE:
            _say(f'error: {missing} is not installed, which this takes: pip install "obfuscatune[service]"')
            return EXIT_USAGE
        kind = type(error).__name__
        _say(f"error: unexpected {kind}: {error} (a fault of ours; --debug shows where)")
        return EXIT_FAILURE


def _prepare_libraries() -> None:
    """Settings that the libraries read when they are imported. What the user has set stays."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        os.environ.setdefault(name, value)


def _warn_of_unknown_variables() -> None:
    """A misspelt variable would be left out of account without a word."""
    for name in sorted(os.environ):
        if name.startswith(_PREFIX) and name not in _VARIABLES:
            near = get_close_matches(name, _VARIABLES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_VARIABLES)}"
            _say(f"warning: {name} is set in the environment and is no variable of ours; {hint}")


def _say(message: str) -> None:
    sys.stderr.write(" ".join(message.split()) + "\n")
