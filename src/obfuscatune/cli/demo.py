"""`obfuscatune demo`: runs it, and shows it on the terminal. What it does is in
obfuscatune/demo/, and with --three-parties in obfuscatune/demo/parties/."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obfuscatune.cli import options, output
from obfuscatune.cli.options import AsJson
from obfuscatune.cli.protection import Protection
from obfuscatune.cli.session import Session, open_files, open_session
from obfuscatune.option import Option
from obfuscatune.report.page import format_seconds

if TYPE_CHECKING:
    from obfuscatune.demo.result import Name
    from obfuscatune.report.terminal import Curve
    from obfuscatune.training.journal import Event
    from obfuscatune.training.storage import RunDirectory

EXIT_FAILED = 1


def demo(
    out: Annotated[Path, Option("Folder for adapters and report.")] = Path("demo-out"),
    seed: Annotated[int, Option("Of order, fresh factors and dropout, in both runs.")] = 0,
    profile: options.Profile = None,
    quick: Annotated[bool, Option("A few steps and questions: seconds, and nothing learnt.")] = False,
    three_parties: Annotated[
        bool,
        Option("Provider, cloud and owners in processes of their own: sealed, attested, granted; and what is refused."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a model learn private notes on a worker that sees neither, beside the plain run.

    Starts a worker process, asks the embedded model questions about invented patients, fine-tunes it with LoRA on their
    notes, and asks again; then does the same plain, with the same seeds. Ends with exit code 1 if the two do not agree,
    or fewer than 80 % of the answers are right. Two to four minutes on two cores.

    With --three-parties a provider seals a model, a cloud runs it in an attested service, owners fine-tune and ask by
    OpenAI's client, and everything that must be refused is tried; then all that left the enclave is searched for the
    text, the adapter and the weights. Under private and, with the provider as the mask worker, guarded, unless
    --profile names one.
    """
    play = _three_parties if three_parties else _two_runs
    shown = play(out, seed, profile, quick=quick)
    if as_json:
        output.write_json(shown.document)
    else:
        shown.print()
    if not shown.passed:
        raise typer.Exit(EXIT_FAILED)


@dataclass(frozen=True)
class _Shown:
    """What came of a demo, whose files are written; `print` tells it on the terminal."""

    document: dict[str, Any]
    passed: bool
    print: Callable[[], None]


def _written(folder: "RunDirectory", document: dict[str, Any], page: str) -> None:
    from obfuscatune.demo.settings import REPORT, RESULT

    folder.write_file(RESULT, json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n")
    folder.write_file(REPORT, page.encode())


def _three_parties(out: Path, seed: int, profile: str | None, *, quick: bool) -> _Shown:
    from obfuscatune.demo.parties.machines import why_not_isolated
    from obfuscatune.demo.parties.page import render
    from obfuscatune.demo.parties.result import document
    from obfuscatune.demo.parties.run import PROFILES, PartiesSettings, run_parties
    from obfuscatune.demo.parties.terminal import TerminalScreen, print_result
    from obfuscatune.demo.settings import claim

    missing = why_not_isolated()
    settings = PartiesSettings(PROFILES if profile is None else (profile,), quick, seed, isolated=missing is None)
    folder = claim(out, PROFILES)
    output.notice(
        "A provider, a cloud and two owners, who need not trust each other. The enclave is an ordinary process here, "
        "and its evidence is SIMULATED: it proves nothing."
    )
    if missing is None:
        output.notice("Each machine has a network namespace of its own.")
    else:
        output.notice(f"No network namespaces ({missing}): all machines are on 127.0.0.1.")
    screen = TerminalScreen(output.stderr())
    with screen.shown():
        result = run_parties(settings, folder.root.resolve(), screen)
    found = document(result)
    _written(folder, found, render(result))
    return _Shown(found, result.passed, lambda: print_result(result, out))


def _two_runs(out: Path, seed: int, profile: str | None, *, quick: bool) -> _Shown:
    from obfuscatune.demo.page import render
    from obfuscatune.demo.result import document
    from obfuscatune.demo.run import run_demo
    from obfuscatune.demo.settings import Settings, claim
    from obfuscatune.demo.terminal import print_result

    settings = Settings(seed, quick, profile or "private")
    folder = claim(out)
    output.notice(
        "A language model learns private clinic notes: on a worker that sees neither in the clear, then plain."
    )
    with output.progress("opening the embedded model"):
        files = open_files(None)

    protection = Protection(profile=settings.profile)

    def opening(name: "Name") -> AbstractContextManager[Session]:
        return open_session(files, dtype="float32", protection=protection if name == "protected" else None)

    result = run_demo(settings, out, files.directory, files.tokenizer, opening, _Screen())
    found = document(result)
    _written(folder, found, render(result))
    return _Shown(found, result.passed, lambda: print_result(result, out))


class _Screen:
    """Progress on stderr: a picture on a terminal, lines elsewhere. A line stays for each run that is done."""

    def __init__(self) -> None:
        self._curves: list[Curve] = []

    @contextmanager
    def asking(self, name: "Name", *, tuned: bool, total: int) -> Iterator[Callable[[int], None]]:
        when = "after" if tuned else "before"
        with output.progress(f"{name}: asking {total} questions {when} fine-tuning") as meter:
            meter.expect(total)
            yield meter.advance

    @contextmanager
    def training(self, name: "Name") -> Iterator[Callable[["Event"], None]]:
        from obfuscatune.demo.terminal import STYLES, live_curve
        from obfuscatune.report.terminal import Curve
        from obfuscatune.training.loop import StepEvent

        console = output.stderr()
        losses: list[float] = []
        began = time.perf_counter()
        showing = live_curve(console, name, self._curves) if console.is_terminal else _lines(name)
        with showing as show:

            def see(event: "Event") -> None:
                if isinstance(event, StepEvent):
                    losses.append(event.loss)
                show(event)

            yield see
        self._curves.append(Curve(name, losses, STYLES[name]))
        curve, seconds = output.sparkline(losses, width=24), format_seconds(time.perf_counter() - began)
        output.notice(f"{name:<9}  {curve}  loss {losses[0]:.4f} -> {losses[-1]:.4f}, {len(losses)} steps, {seconds}")


@contextmanager
def _lines(name: "Name") -> Iterator[Callable[["Event"], None]]:
    """For logs and pipes."""
    from obfuscatune.training.journal import Started
    from obfuscatune.training.loop import StepEvent

    with output.progress(f"{name}: fine-tuning") as meter:

        def see(event: "Event") -> None:
            match event:
                case Started(total_steps=total):
                    meter.expect(total)
                case StepEvent(loss=loss):
                    meter.advance(1, f"loss {loss:.4f}")

        yield see
