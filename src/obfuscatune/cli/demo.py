"""`obfuscatune demo`: runs it, and shows it on the terminal. What it does is in obfuscatune/demo/."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obfuscatune.cli import options, output
from obfuscatune.cli.options import AsJson
from obfuscatune.cli.session import Protection, Session, open_files, open_session
from obfuscatune.option import Option
from obfuscatune.report.page import format_seconds

if TYPE_CHECKING:
    from obfuscatune.demo.result import Name
    from obfuscatune.report.braille import Curve
    from obfuscatune.training.journal import Event

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
    if three_parties:
        from obfuscatune.cli.three_parties import show

        show(out, seed, profile, quick=quick, as_json=as_json)
        return
    from obfuscatune.demo.page import render
    from obfuscatune.demo.result import document
    from obfuscatune.demo.run import run_demo
    from obfuscatune.demo.settings import REPORT, RESULT, Settings, claim
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
    folder.write_file(RESULT, json.dumps(found, indent=2, ensure_ascii=False).encode() + b"\n")
    folder.write_file(REPORT, render(result).encode())
    if as_json:
        output.write_json(found)
    else:
        print_result(result, out)
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)


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
        from obfuscatune.report.braille import Curve
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
