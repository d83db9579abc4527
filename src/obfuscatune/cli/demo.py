"""`obfuscatune demo`: runs it, and shows it on the terminal. What it does is in obfuscatune/demo/."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obfuscatune.cli import output
from obfuscatune.cli.options import AsJson, option
from obfuscatune.cli.session import ModelFiles, Protection, open_files, open_session
from obfuscatune.report.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from obfuscatune.demo.recipe import Settings
    from obfuscatune.demo.result import Result
    from obfuscatune.demo.side import Name
    from obfuscatune.report.braille import Curve
    from obfuscatune.tuning.journal import Event
    from obfuscatune.tuning.storage import RunDirectory

EXIT_FAILED = 1


def demo(
    out: Annotated[Path, option("--out", "Folder for adapters and report.", default="demo-out")] = Path("demo-out"),
    seed: Annotated[int, option("--seed", "Of order, fresh factors and dropout, in both runs.", default="0")] = 0,
    quick: Annotated[bool, option("--quick", "A few steps and questions: seconds, and nothing learnt.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a model learn private notes on a worker that sees neither, beside the plain run.

    Starts a worker process, asks the embedded model questions about invented patients, fine-tunes it with LoRA on their
    notes, and asks again; then does the same plain, with the same seeds. Ends with exit code 1 if the two do not agree,
    or fewer than 80 % of the answers are right. Two to four minutes on two cores.
    """
    from obfuscatune.demo.folder import REPORT, RESULT, claim
    from obfuscatune.demo.page import render
    from obfuscatune.demo.recipe import Settings
    from obfuscatune.demo.result import document

    folder = claim(out)
    output.notice(
        "A language model learns private clinic notes: on a worker that sees neither in the clear, then plain."
    )
    with output.progress("opening the embedded model"):
        files = open_files(None)
    result = _run(Settings(seed, quick), folder, files)
    found = document(result)
    folder.write_file(RESULT, json.dumps(found, indent=2, ensure_ascii=False).encode() + b"\n")
    folder.write_file(REPORT, render(result).encode())
    if as_json:
        output.write_json(found)
    else:
        _tell(result, out)
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)


def _run(settings: "Settings", folder: "RunDirectory", files: ModelFiles) -> "Result":
    from obfuscatune.demo.compare import check, compare_sides
    from obfuscatune.demo.recipe import held_out
    from obfuscatune.demo.result import Result, Shape
    from obfuscatune.demo.side import Task, run_side
    from obfuscatune.enclave.plan import make_plan, model_from_config
    from obfuscatune.enclave.profiles import resolve
    from obfuscatune.evaluation.questions import load_completions
    from obfuscatune.report.environment import environment
    from obfuscatune.tuning.identity import model_fingerprint

    began = time.perf_counter()
    questions = load_completions(held_out(), settings.questions)
    task = Task(files.tokenizer, questions, model_fingerprint(files.directory))
    screen = _Screen()
    protected = run_side(
        "protected",
        open_session(files, dtype="float32", protection=Protection()),
        task,
        settings.recipe(folder.root / "protected", plain=False),
        screen,
    )
    plain = run_side(
        "plain",
        open_session(files, dtype="float32", protection=None),
        task,
        settings.recipe(folder.root / "plain", plain=True),
        screen,
    )
    differences = compare_sides(protected, plain)
    counted = make_plan(model_from_config(files.directory), resolve("private"))
    return Result(
        settings,
        Shape(counted.parameters, counted.enclave_parameters),
        protected,
        plain,
        differences,
        check(settings, protected, plain, differences),
        questions,
        environment(),
        time.perf_counter() - began,
    )


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
        from obfuscatune.demo.live import STYLES, live_curve
        from obfuscatune.report.braille import Curve
        from obfuscatune.tuning.loop import StepEvent

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
    from obfuscatune.tuning.journal import Started
    from obfuscatune.tuning.loop import StepEvent

    with output.progress(f"{name}: fine-tuning") as meter:

        def see(event: "Event") -> None:
            match event:
                case Started(total_steps=total):
                    meter.expect(total)
                case StepEvent(loss=loss):
                    meter.advance(1, f"loss {loss:.4f}")

        yield see


def _tell(result: "Result", out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from obfuscatune.demo import table
    from obfuscatune.demo.folder import REPORT
    from obfuscatune.demo.live import STYLES, chart
    from obfuscatune.report.braille import Curve

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a pipe has no width: let no line be cut
    beside = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for index, column in enumerate(table.COLUMNS):
        beside.add_column(column, style="" if index else "bold")
    for row in table.rows(result):
        beside.add_row(*row)
    if console.is_terminal:
        sides = (result.protected, result.plain)
        curves = [Curve(side.name, side.losses, STYLES[side.name]) for side in sides]
        console.print(chart(curves, len(result.plain.steps), console.width))
    console.print()
    console.print(beside)
    console.print()
    _tell_samples(result, console)
    for check in result.checks:
        if not check.passed:
            console.print(
                f"FAILED  {check.name}: {check.measured:.3g}, the limit is {check.limit:.3g}", style="bold red"
            )
    if result.passed:
        said = "Neither model nor text went to the worker in the clear, and both runs agree."
        console.print(said, style="bold green")
    console.print()
    console.print(f"report     {out / REPORT}", soft_wrap=True)
    console.print(f"adapters   {result.protected.adapter}  {result.plain.adapter}", soft_wrap=True)
    console.print()
    console.print("Next", style="bold")
    for what, command in _next_steps(result):
        console.print(f"  {what:<27}{command}", soft_wrap=True, markup=False)


def _tell_samples(result: "Result", console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    samples = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    samples.add_column("asked")
    for heading in ("true", "before", "protected", "plain"):
        samples.add_column(heading, max_width=18, no_wrap=True, overflow="ellipsis")
    for it in result.samples():
        after = (Text(answer, style="green" if answer == it.truth else "red") for answer in (it.protected, it.plain))
        samples.add_row(Text(it.question), Text(it.truth), Text(it.before, style="dim"), *after)
    console.print(samples)
    console.print()


def _next_steps(result: "Result") -> list[tuple[str, str]]:
    return [
        ("ask the tuned model", f"obfuscatune generate --adapter {result.protected.adapter} --prompt 'Question: ...'"),
        ("your own model and text", "obfuscatune finetune --model MODEL --data train.jsonl"),
        ("a worker elsewhere", "obfuscatune worker --help, then finetune --worker tcp:HOST:7600"),
        ("what runs where", "obfuscatune inspect --model MODEL"),
    ]
