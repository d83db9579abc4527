"""The audit's report: a page, JSON, Markdown for the docs, and tables on a terminal; all of one grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from obfuscatune.audit.attacks.base import Attack, Finding
from obfuscatune.audit.grid import SMALLEST_EFFECT, Cell, Grid
from obfuscatune.audit.verdict import State, advice, not_run, verdicts
from obfuscatune.audit.verdict import Verdict as AuditVerdict
from obfuscatune.report.charts import Chart, Series
from obfuscatune.report.page import Facts, HeatCell, HeatMap, Section, Table, Verdict, markdown_table, render_page

MOST_SERIES = 4
MOST_TEXTS = 12
LONGEST_TEXT = 160
_STYLES = {State.BROKEN: "bold red", State.OPEN: "yellow", State.HOLDS: "green", State.UNKNOWN: "dim"}
_HEAT = {State.BROKEN: 1.0, State.OPEN: 0.3, State.HOLDS: 0.0, State.UNKNOWN: None}


def _profiles(grid: Grid) -> list[str]:
    return list(dict.fromkeys(cell.profile for cell in grid.cells))


def _by_model(grid: Grid) -> Iterator[tuple[str, list[tuple[Attack, list[Cell]]]]]:
    """Each model with its attacks, and for each attack a cell of every profile."""
    for model in dict.fromkeys(cell.model for cell in grid.cells):
        mine = [cell for cell in grid.cells if cell.model == model]
        rows = []
        for attack in dict.fromkeys(cell.attack for cell in mine):
            own = {cell.profile: cell for cell in mine if cell.attack is attack}
            rows.append((attack, [own[profile] for profile in _profiles(grid)]))
        yield model, rows


def _by_attacker(grid: Grid) -> tuple[list[str], list[tuple[str, list[AuditVerdict]]]]:
    """The attackers, and each profile with a verdict for every one of them."""
    found = {(it.profile, it.attacker): it for it in verdicts(grid)}
    attackers = list(dict.fromkeys(attacker for _, attacker in found))
    profiles = dict.fromkeys(profile for profile, _ in found)
    return [*attackers], [(profile, [found[profile, attacker] for attacker in attackers]) for profile in profiles]


def as_json(grid: Grid, environment: dict[str, str]) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "seeds": grid.seeds,
        "drift": grid.drift,
        "advice": advice(grid),
        "environment": environment,
        "verdicts": [
            {
                "profile": it.profile,
                "attacker": it.attacker.value,
                "promised": [target.value for target in it.promised],
                "state": it.state.value,
                "text": it.text,
            }
            for it in verdicts(grid)
        ],
        "masks": [
            {"model": model, "profile": profile, **asdict(account)} for (model, profile), account in grid.masks.items()
        ],
        "cells": [_cell(cell) for cell in grid.cells],
    }


def _cell(cell: Cell) -> dict[str, Any]:
    attack = cell.attack
    known: dict[str, Any] = {
        "model": cell.model,
        "profile": cell.profile,
        "attack": attack.name,
        "attacker": attack.needs.value,
        "target": attack.target.value,
        "measure": attack.measure,
        "source": attack.source,
        "ran": len(cell.findings),
        "not_run": cell.why_not or None,
    }
    if cell.findings:
        known |= {
            "value": cell.value,
            "chance": cell.chance,
            "error": cell.error,
            "advantage": cell.advantage,
            "succeeds": cell.succeeds,
        }
    known["seeds"] = [asdict(it) if isinstance(it, Finding) else {"not_run": it.why} for it in cell.results]
    return known


def mask_accounts(grid: Grid) -> Iterator[str]:
    """For each model and profile with masks a sentence: what was sent, and the most that can be learned of it."""
    for (model, profile), account in grid.masks.items():
        yield (
            f"{profile} on {model}: {account.rows:,} rows were sent under masks in a run; any test on all that the "
            f"compute worker saw has an advantage of at most {account.advantage:.2g} (budget {account.budget:g})."
        )


def as_markdown(grid: Grid) -> str:
    """What to do, who learns what, a table for each model with attacks down and profiles across, what was not run."""
    attackers, rows = _by_attacker(grid)
    states = [
        (f"`{profile}`", *(f"**{it.state}**" if it.state is State.BROKEN else it.state for it in row))
        for profile, row in rows
    ]
    lines = [advice(grid), "", _text_table(("profile", *attackers), states), ""]
    for model, attacks in _by_model(grid):
        columns = ("attack", "attacker", "on", *(f"`{name}`" for name in _profiles(grid)))
        table = _text_table(columns, [(it.name, it.needs, it.target, *map(figure, cells)) for it, cells in attacks])
        lines += [f"### {model}, {grid.seeds} {'seed' if grid.seeds == 1 else 'seeds'}", "", table, ""]
    lines += ["### In words", "", *(f"- {text}" for text in mask_accounts(grid))]
    lines += [f"- {it.text}" for it in verdicts(grid)]
    missing = [f"- {where}: {why}" for where, why in not_run(grid)]
    if missing:
        lines += ["", "### Not run, and so not withstood", "", *missing]
    return "\n".join(lines) + "\n"


def _text_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return markdown_table(columns, rows, text_columns=len(columns))


def figure(cell: Cell) -> str:
    """`0.98 (chance 0.50)`, in bold where it beats chance."""
    if not cell.findings:
        return "not run"
    text = f"{_short(cell.value)} ({_short(cell.chance)})"
    return f"**{text}**" if cell.succeeds else text


def _short(value: float) -> str:
    return "0.00" if math.isclose(value, 0.0, abs_tol=0.005) else f"{value:.2f}"


def print_grid(grid: Grid) -> None:
    """What to do, a table for each model with chance beside each figure, what was not run, and all in words."""
    from rich.text import Text

    from obfuscatune.report.terminal import plain_table, result_console

    def shown(cell: Cell) -> Text:
        if not cell.findings:
            return Text("not run", style="dim")
        return Text(f"{cell.value:.3f} ({cell.chance:.3f})", style="red" if cell.succeeds else "green")

    console = result_console()
    for model, attacks in _by_model(grid):
        title = f"{model}: value (chance), mean of {grid.seeds} seeds"
        table = plain_table("attack", "attacker", *_profiles(grid), title=title)
        for attack, cells in attacks:
            table.add_row(attack.name, attack.needs.value, *map(shown, cells))
        console.print(table)
        console.print()
    for where, why in not_run(grid):
        console.print(Text(f"not run: {where}: {why}", style="dim"))
    for it in verdicts(grid):
        console.print(Text(it.text, style=_STYLES[it.state]))
    for text in mask_accounts(grid):
        console.print(Text(text))
    console.print()
    console.print(Text(advice(grid), style="bold"))


def render(grid: Grid, environment: Mapping[str, str]) -> str:
    """`report.html` as text: what to do, who learns what, a heat map for each model, curves, recovered text."""
    drift = ", ".join(f"{name} {100 * share:.1f} %" for name, share in grid.drift.items())
    sections: list[Section] = [
        Verdict(advice(grid)),
        _overview(grid),
        Table("The same in words", ("profile and attacker",), [(it.text,) for it in verdicts(grid)]),
        *_masks(grid),
        *_maps(grid),
        *_curves(grid),
        _texts(grid),
        *_not_run(grid),
        _attacks(grid),
        Facts("Run", {"seeds": str(grid.seeds), "secret model's distance from its base": drift, **environment}),
    ]
    return render_page(
        title="What a worker learns",
        subtitle="obfuscatune audit: every attack we know on recorded transcripts of fine-tuning and generation",
        sections=sections,
        footer="Written by `obfuscatune audit`; the same in numbers is in audit.json beside this page.",
    )


def _overview(grid: Grid) -> HeatMap:
    """Profiles down, attackers across."""
    attackers, rows = _by_attacker(grid)
    return HeatMap(
        "Who learns tokens or weights",
        attackers,
        [(profile, "", [*map(_state, row)]) for profile, row in rows],
        caption="The attack that gets furthest is beneath each state. Strong red: a promise of docs/threat-model.md is "
        "broken. Pale red: open, which nobody promised to hide. Hatched: no attack had its chance.",
    )


def _state(verdict: AuditVerdict) -> HeatCell:
    strongest = verdict.strongest
    below = f"of {verdict.withstood}" if strongest is None else f"{strongest.attack.name} {strongest.value:.2f}"
    return HeatCell(verdict.state, below, _HEAT[verdict.state], verdict.text)


def _masks(grid: Grid) -> Iterator[Table]:
    rows = [(text,) for text in mask_accounts(grid)]
    if rows:
        yield Table("What the masks account for", ("profile and model",), rows)


def _maps(grid: Grid) -> Iterator[Section]:
    for model, attacks in _by_model(grid):
        yield HeatMap(
            f"Attacks on {model}",
            _profiles(grid),
            [(it.name, f"{it.target}, {it.needs}", [*map(_heat, cells)]) for it, cells in attacks],
            caption="Mean over seeds, chance beneath. Green: within three standard errors of chance, or nearer "
            f"to it than {SMALLEST_EFFECT:.0%} of the way to complete success. Red: better, the "
            "stronger the nearer to complete success. Hatched: could not be run, and so is not withstood.",
        )


def _heat(cell: Cell) -> HeatCell:
    if not cell.findings:
        return HeatCell("not run", "", None, cell.why_not)
    below = f"chance {cell.chance:.3f} ± {cell.error:.3f}"
    return HeatCell(f"{cell.value:.3f}", below, cell.advantage if cell.succeeds else 0.0, cell.attack.measure)


def _curves(grid: Grid) -> Iterator[Section]:
    """The first seed's, an attack after the other."""
    for attack in dict.fromkeys(cell.attack for cell in grid.cells):
        for model in dict.fromkeys(cell.model for cell in grid.cells):
            cells = [it for it in grid.cells if it.attack is attack and it.model == model]
            series = [Series(it.profile, it.findings[0].curve) for it in cells if it.findings and it.findings[0].curve]
            if series:
                yield Chart(
                    f"{attack.name} on {model}: how much it takes",
                    series[:MOST_SERIES],
                    x_label="known training calls",
                    y_label="value",
                    caption=f"Value: {attack.measure}. First seed.",
                )


def _texts(grid: Grid) -> Table:
    """Text of the first seed, where the attack beats chance."""
    rows = []
    for cell in grid.cells:
        if cell.succeeds and cell.findings[0].recovered:
            piece = cell.findings[0].recovered[0]
            where = f"{cell.model}, {cell.profile}, {cell.attack.name}"
            rows.append((where, _cut(piece.true), _cut(piece.guess)))
    return Table(
        "Recovered text beside the true one",
        ("where", "true", "recovered"),
        rows[:MOST_TEXTS],
        caption="" if rows else "No attack on tokens beat chance.",
        text_columns=3,
    )


def _not_run(grid: Grid) -> Iterator[Table]:
    rows = list(not_run(grid))
    if rows:
        yield Table("Not run, and so not withstood", ("attack", "why"), rows, text_columns=2)


def _attacks(grid: Grid) -> Table:
    attacks: list[Attack] = list(dict.fromkeys(cell.attack for cell in grid.cells))
    rows = [(it.name, str(it.needs), str(it.target), it.measure, it.source) for it in attacks]
    return Table("The attacks", ("attack", "needs", "on", "measure", "source"), rows, text_columns=5)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
