"""A table whose cells are coloured by how bad they are, on the page's own colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_LIGHTEST, _DARKEST = 8, 70


@dataclass(frozen=True)
class HeatCell:
    """`text` large, `below` small under it; `heat` from 0 to 1, None where nothing was measured."""

    text: str
    below: str
    heat: float | None
    hint: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells under headings. `rows` are (name, what it is, cells)."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[HeatCell]]]
    caption: str = ""

    def html(self) -> str:
        """One `<section>`."""
        head = "".join(f"<th>{escape(column)}</th>" for column in ("", *self.columns))
        body = "".join(self._row(*row) for row in self.rows)
        table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        caption = f'<p class="caption">{escape(self.caption)}</p>' if self.caption else ""
        return f"<section><h2>{escape(self.heading)}</h2>{table}{caption}</section>"

    def _row(self, name: str, what: str, cells: Sequence[HeatCell]) -> str:
        first = f'<td><b>{escape(name)}</b><div class="label">{escape(what)}</div></td>'
        return f"<tr>{first}{''.join(map(_cell, cells))}</tr>"


def _cell(cell: HeatCell) -> str:
    """Coloured by mixing the page's red into its background; what was not measured is hatched."""
    if cell.heat is None:
        look = "background: repeating-linear-gradient(45deg, transparent 0 6px, var(--line) 6px 7px)"
    elif cell.heat <= 0:
        look = "background: var(--good-back)"
    else:
        share = round(_LIGHTEST + (_DARKEST - _LIGHTEST) * min(1.0, cell.heat))
        look = f"background: color-mix(in srgb, var(--bad) {share}%, transparent)"
    hint = f' title="{escape(cell.hint)}"' if cell.hint else ""
    below = f'<div class="caption" style="margin: 0; color: inherit; opacity: 0.75">{escape(cell.below)}</div>'
    return f'<td style="{look}; padding: 7px 10px"{hint}><b>{escape(cell.text)}</b>{below}</td>'
