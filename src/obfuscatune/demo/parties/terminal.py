"""The demo of three parties on a terminal: a line for each step and each refusal, and the verdict."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Column
from rich.text import Text

from obfuscatune.demo.parties.result import Refusal, Result, Searched, Step
from obfuscatune.demo.settings import REPORT
from obfuscatune.report.page import format_seconds
from obfuscatune.report.terminal import plain_table, result_console

_STYLES = {"provider": "magenta", "cloud": "blue", "alice": "cyan", "bob": "cyan", "mallory": "red", "all": "white"}
_SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal to show what is being done."""


class TerminalScreen:
    """Lines on a console as things happen, and below them, on a terminal, what is being done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While the demo runs."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status("") as self._status:
            yield

    def doing(self, what: str) -> None:
        """See `Screen`."""
        if self._status is not None:
            self._status.update(Text(what))
        elif time.monotonic() >= self._next:
            self._print(Text(f"  …         {what}"))

    def step(self, step: Step) -> None:
        """See `Screen`."""
        line = Text(f"  {step.who:<9} ", style=f"bold {_STYLES.get(step.who, 'white')}")
        line.append(step.what, style="default not bold")
        if step.told:
            line.append(f": {step.told}", style="default not bold")
        line.append(f"  {format_seconds(step.seconds)}", style="dim not bold")
        self._print(line)

    def refusal(self, refusal: Refusal) -> None:
        """See `Screen`."""
        style = "green" if refusal.held else "bold red"
        line = Text("  refused:  " if refusal.held else "  NOT REFUSED  ", style=style)
        line.append(f"{refusal.who} {refusal.attempt}", style="default not bold")
        line.append(f": {refusal.reason}", style="dim not bold")
        self._print(line)

    def searched(self, searched: Searched) -> None:
        """See `Screen`."""
        count = sum(searched.found.values())
        line = Text("  search    ", style="bold white" if searched.held else "bold red")
        line.append(
            f"{searched.place}: {count or 'nothing'} found in {searched.megabytes:,.1f} MB", style="default not bold"
        )
        self._print(line)

    def _print(self, line: Text) -> None:
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._console.print(line, soft_wrap=True)


def print_result(result: Result, out: Path) -> None:
    """The verdict, how training went, and where the files are."""
    console = result_console()
    headings = ("loss", "answered right", "refused", "searched, found nothing", "controls, found")
    table = plain_table(Column("", style="bold"), *headings, gap=3)
    for scene in result.scenes:
        quiet = [it for it in scene.searches if not it.is_control]
        loud = [it for it in scene.searches if it.is_control]
        table.add_row(
            scene.profile,
            f"{scene.losses[0]:.3f} -> {scene.losses[-1]:.3f}",
            f"{scene.right}/{len(scene.answers)}",
            f"{sum(it.held for it in scene.refusals)}/{len(scene.refusals)}",
            f"{sum(it.held for it in quiet)}/{len(quiet)}, {sum(it.megabytes for it in quiet):,.0f} MB",
            f"{sum(it.held for it in loud)}/{len(loud)}",
        )
    verdict = Text(
        "Each let go of his secret only to code that he had checked, and nothing leaked.", style="bold green"
    )
    if not result.passed:
        lines = [f"FAILED  {scene.profile}: {line}" for scene in result.scenes for line in scene.failures()]
        verdict = Text("\n".join(lines), style="bold red")
    for part in ("", table, "", verdict, ""):
        console.print(part)
    console.print(f"{'report':<19}{out / REPORT}", soft_wrap=True, markup=False)
    for scene in result.scenes:
        console.print(
            f"{scene.profile:<19}{out / scene.profile}: a directory for each party", soft_wrap=True, markup=False
        )
