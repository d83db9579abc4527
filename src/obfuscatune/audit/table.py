"""The grid on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from obfuscatune.audit.grid import Cell, Grid
from obfuscatune.audit.verdict import State, advice, not_run, verdicts

_PIPE_WIDTH = 160
"""A pipe has no width of its own: let no line be cut."""
_STYLES = {State.BROKEN: "bold red", State.OPEN: "yellow", State.HOLDS: "green", State.UNKNOWN: "dim"}


def print_grid(grid: Grid) -> None:
    """What to do, a table for each model with chance beside each figure, what was not run, and all in words."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    profiles = list(dict.fromkeys(cell.profile for cell in grid.cells))
    for model in dict.fromkeys(cell.model for cell in grid.cells):
        table = Table(title=f"{model}: value (chance), mean of {grid.seeds} seeds", title_justify="left", box=None)
        for heading in ("attack", "attacker", *profiles):
            table.add_column(heading)
        mine = [cell for cell in grid.cells if cell.model == model]
        for attack in dict.fromkeys(cell.attack for cell in mine):
            row = {cell.profile: _figure(cell) for cell in mine if cell.attack is attack}
            table.add_row(attack.name, attack.needs.value, *(row[name] for name in profiles))
        console.print(table)
        console.print()
    for where, why in not_run(grid):
        console.print(Text(f"not run: {where}: {why}", style="dim"))
    for it in verdicts(grid):
        console.print(Text(it.text, style=_STYLES[it.state]))
    console.print()
    console.print(Text(advice(grid), style="bold"))


def _figure(cell: Cell) -> Text:
    if not cell.findings:
        return Text("not run", style="dim")
    return Text(f"{cell.value:.3f} ({cell.chance:.3f})", style="red" if cell.succeeds else "green")
