"""The report as a page: what to do, who learns what, a heat map for each model, curves, recovered text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from obfuscatune.attacks.base import Attack
from obfuscatune.audit.grid import SMALLEST_EFFECT, Cell, Grid
from obfuscatune.audit.verdict import State, Verdict, advice, not_run, verdicts
from obfuscatune.report.curves import Series
from obfuscatune.report.heatmap import HeatCell, HeatMap
from obfuscatune.report.page import Advice, Chart, Facts, Section, Table, render_page

MOST_SERIES = 4
MOST_TEXTS = 12
LONGEST_TEXT = 160


def render(grid: Grid, environment: Mapping[str, str]) -> str:
    """`report.html` as text."""
    drift = ", ".join(f"{name} {100 * share:.1f} %" for name, share in grid.drift.items())
    sections: list[Section] = [
        Advice(advice(grid)),
        _overview(grid),
        _words(grid),
        *_maps(grid),
        *_curves(grid),
        _texts(grid),
        *_not_run(grid),
        _attacks(grid),
    ]
    sections.append(
        Facts("Run", {"seeds": str(grid.seeds), "secret model's distance from its base": drift, **environment})
    )
    return render_page(
        title="What a worker learns",
        subtitle="obfuscatune audit: every attack we know on recorded transcripts of fine-tuning and generation",
        sections=sections,
        footer="Written by `obfuscatune audit`; the same in numbers is in audit.json beside this page.",
    )


_HEAT = {State.BROKEN: 1.0, State.OPEN: 0.3, State.HOLDS: 0.0, State.UNKNOWN: None}


def _overview(grid: Grid) -> HeatMap:
    """Profiles down, attackers across."""
    found = {(it.profile, it.attacker): it for it in verdicts(grid)}
    attackers = list(dict.fromkeys(attacker for _, attacker in found))
    rows = [
        (profile, "", [_state(found[profile, attacker]) for attacker in attackers])
        for profile in dict.fromkeys(profile for profile, _ in found)
    ]
    return HeatMap(
        "Who learns tokens or weights",
        attackers,
        rows,
        caption="The attack that gets furthest is beneath each state. Dark red: a promise of docs/threat-model.md is "
        "broken. Light red: open, which nobody promised to hide. Hatched: no attack had its chance.",
    )


def _state(verdict: Verdict) -> HeatCell:
    strongest = verdict.strongest
    below = f"of {verdict.withstood}" if strongest is None else f"{strongest.attack.name} {strongest.value:.2f}"
    return HeatCell(verdict.state, below, _HEAT[verdict.state], verdict.text)


def _words(grid: Grid) -> Table:
    rows = [(it.text,) for it in verdicts(grid)]
    return Table("The same in words", ("profile and attacker",), rows)


def _not_run(grid: Grid) -> Iterator[Table]:
    rows = list(not_run(grid))
    if rows:
        yield Table("Not run, and so not withstood", ("attack", "why"), rows, text_columns=2)


def _maps(grid: Grid) -> Iterator[Section]:
    profiles = list(dict.fromkeys(cell.profile for cell in grid.cells))
    for model in dict.fromkeys(cell.model for cell in grid.cells):
        mine = [cell for cell in grid.cells if cell.model == model]
        rows = []
        for attack in dict.fromkeys(cell.attack for cell in mine):
            by_profile = {cell.profile: _heat(cell) for cell in mine if cell.attack is attack}
            rows.append((attack.name, f"{attack.target}, {attack.needs}", [by_profile[name] for name in profiles]))
        yield HeatMap(
            f"Attacks on {model}",
            profiles,
            rows,
            caption="Mean over seeds, chance beneath. Green: within three standard errors of chance, or nearer "
            f"to it than {SMALLEST_EFFECT:.0%} of the way to complete success. Red: better, the "
            "darker the nearer to complete success. Hatched: could not be run, and so is not withstood.",
        )


def _heat(cell: Cell) -> HeatCell:
    if not cell.findings:
        return HeatCell("not run", "", None, cell.why_not)
    below = f"chance {cell.chance:.3f} ± {cell.error:.3f}"
    return HeatCell(f"{cell.value:.3f}", below, cell.advantage if cell.succeeds else 0.0, cell.attack.measure)


def _curves(grid: Grid) -> Iterator[Section]:
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


def _attacks(grid: Grid) -> Table:
    attacks: list[Attack] = list(dict.fromkeys(cell.attack for cell in grid.cells))
    rows = [(it.name, str(it.needs), str(it.target), it.measure, it.source) for it in attacks]
    return Table("The attacks", ("attack", "needs", "on", "measure", "source"), rows, text_columns=5)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
