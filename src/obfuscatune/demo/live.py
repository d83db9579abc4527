"""Fine-tuning as it is seen on a terminal: the loss drawn step by step, the run before it beneath, and a bar."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from obfuscatune.report.braille import Curve, draw, legend
from obfuscatune.tuning.journal import Event, Measured, Started

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
