"""The demo on a terminal: the loss drawn while it runs, and what is printed at the end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from obfuscatune.demo.page import COLUMNS, table_rows
from obfuscatune.demo.result import Result
from obfuscatune.demo.settings import REPORT
from obfuscatune.report.terminal import Curve, draw, legend, plain_table, result_console
from obfuscatune.training.journal import Event, Measured, Started

STYLES = {"protected": "cyan", "plain": "yellow"}
_ROWS = 9
_WIDEST = 100
_REDRAWN_PER_SECOND = 5  # each costs a few milliseconds of the time that is being measured


def chart(curves: Sequence[Curve], steps: int, columns: int) -> RenderableType:
    """The curves and their legend, to be printed."""
    return Group(legend(curves), draw(curves, steps=steps, columns=min(columns - 2, _WIDEST), rows=_ROWS))


@contextmanager
def live_curve(console: Console, name: str, earlier: Sequence[Curve]) -> Iterator[Callable[[Event], None]]:
    """Draw while the `with` lasts, and wipe it away afterwards.

    Args:
        earlier: curves of the runs before, which this one is drawn over.

    Yields:
        A function to call with each event.
    """
    losses: list[float] = []
    curves = [*earlier, Curve(name, losses, STYLES[name])]
    bar = Progress(
        TextColumn("  {task.description:<9}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
    task = bar.add_task(name, total=None, note="")
    steps = 1

    def see(event: Event) -> None:
        nonlocal steps
        match event:
            case Started(total_steps=total):
                steps = total
                bar.update(task, total=total)
            case Measured():
                pass
            case _:
                losses.append(event.loss)
                bar.update(task, advance=1, note=f"loss {event.loss:.4f}")

    def picture() -> RenderableType:
        return Padding(Group(chart(curves, steps, console.width), "", bar), (1, 0, 0, 0))

    with Live(get_renderable=picture, console=console, refresh_per_second=_REDRAWN_PER_SECOND, transient=True):
        yield see


def print_result(result: Result, out: Path) -> None:
    """Curves (on a terminal), the table, a few questions, what failed, where the files are, and what to try next."""
    console = result_console()
    sides = (result.protected, result.plain)
    if console.is_terminal:
        curves = [Curve(side.name, side.losses, STYLES[side.name]) for side in sides]
        console.print(chart(curves, len(result.plain.steps), console.width))
    for part in ("", _beside(result), "", _samples(result), "", _verdict(result), ""):
        console.print(part)
    files = {"report": out / REPORT} | {f"{side.name} adapter": side.adapter for side in sides}
    for what, path in files.items():
        console.print(f"{what:<19}{path}", soft_wrap=True, markup=False)
    console.print()
    console.print("Next", style="bold")
    for what, command in _next_steps(result):
        console.print(f"  {what:<25}{command}", soft_wrap=True, markup=False)


def _beside(result: Result) -> Table:
    name, *others = COLUMNS
    beside = plain_table(Column(name, style="bold"), *others, gap=3)
    for row in table_rows(result):
        beside.add_row(*map(Text, row))
    return beside


def _samples(result: Result) -> Table:
    answers = ("true", "before", "protected", "plain")
    samples = plain_table(
        "asked", *(Column(it, max_width=18, no_wrap=True, overflow="ellipsis") for it in answers), gap=2
    )
    for it in result.samples():
        after = (Text(answer, style="green" if answer == it.truth else "red") for answer in (it.protected, it.plain))
        samples.add_row(Text(it.question), Text(it.truth), Text(it.before, style="dim"), *after)
    return samples


def _verdict(result: Result) -> Text:
    if result.passed:
        return Text("Neither model nor text went to the worker in the clear, and both runs agree.", style="bold green")
    failed = [it for it in result.checks if not it.passed]
    lines = [f"FAILED  {it.name}: {it.measured:.3g}, the limit is {it.limit:.3g}" for it in failed]
    return Text("\n".join(lines), style="bold red")


def _next_steps(result: Result) -> list[tuple[str, str]]:
    question = result.questions[0].prompt.partition("\n")[0]
    ask = f"obfuscatune generate --adapter {result.protected.adapter} --prompt $'{question}\\nAnswer:'"
    return [
        ("ask the tuned model", ask),
        ("your own model and text", "obfuscatune finetune --model MODEL --data train.jsonl --out runs/mine"),
        (
            "a worker elsewhere",
            "obfuscatune keygen --help, obfuscatune worker --help; then finetune --worker tcp:HOST:7600",
        ),
        ("what would run where", "obfuscatune inspect --model MODEL"),
    ]
