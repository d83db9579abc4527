"""The grid as JSON, and as Markdown for the docs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from obfuscatune.attacks.base import Finding
from obfuscatune.audit.grid import Cell, Grid
from obfuscatune.audit.verdict import State, advice, not_run, verdicts


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


def as_markdown(grid: Grid) -> str:
    """What to do, who learns what, a table for each model with attacks down and profiles across, what was not run."""
    lines = [advice(grid), "", *_overview(grid), *_markdown(grid), "### In words", ""]
    lines += [f"- {it.text}" for it in verdicts(grid)]
    missing = [f"- {where}: {why}" for where, why in not_run(grid)]
    if missing:
        lines += ["", "### Not run, and so not withstood", "", *missing]
    return "\n".join(lines) + "\n"


def _overview(grid: Grid) -> Iterator[str]:
    """Profiles down, attackers across; a broken promise in bold."""
    found = {(it.profile, it.attacker): it.state for it in verdicts(grid)}
    attackers = list(dict.fromkeys(attacker for _, attacker in found))
    yield f"| profile | {' | '.join(attackers)} |"
    yield "|" + "---|" * (1 + len(attackers))
    for profile in dict.fromkeys(profile for profile, _ in found):
        states = (found[profile, attacker] for attacker in attackers)
        yield f"| `{profile}` | {' | '.join(f'**{it}**' if it is State.BROKEN else it for it in states)} |"
    yield ""


def _markdown(grid: Grid) -> Iterator[str]:
    profiles = list(dict.fromkeys(cell.profile for cell in grid.cells))
    for model in dict.fromkeys(cell.model for cell in grid.cells):
        yield f"### {model}, {grid.seeds} {'seed' if grid.seeds == 1 else 'seeds'}"
        yield ""
        yield f"| attack | attacker | on | {' | '.join(f'`{name}`' for name in profiles)} |"
        yield "|" + "---|" * (3 + len(profiles))
        mine = [cell for cell in grid.cells if cell.model == model]
        for attack in dict.fromkeys(cell.attack for cell in mine):
            row = {cell.profile: cell for cell in mine if cell.attack is attack}
            figures = " | ".join(figure(row[name]) for name in profiles)
            yield f"| {attack.name} | {attack.needs} | {attack.target} | {figures} |"
        yield ""


def figure(cell: Cell) -> str:
    """`0.98 (chance 0.50)`, in bold where it beats chance."""
    if not cell.findings:
        return "not run"
    text = f"{_short(cell.value)} ({_short(cell.chance)})"
    return f"**{text}**" if cell.succeeds else text


def _short(value: float) -> str:
    return "0.00" if math.isclose(value, 0.0, abs_tol=0.005) else f"{value:.2f}"
