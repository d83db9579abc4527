"""The document: sections in order, text escaped, nothing loaded from anywhere.

A section is what a command has to show; this file knows how it looks and not what it means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, Protocol

from obfuscatune.report import curves
from obfuscatune.report.style import STYLE

Tone = Literal["plain", "good", "bad"]


class Section(Protocol):
    """A part of the page."""

    def html(self) -> str:
        """An HTML element, every text in it escaped."""


@dataclass(frozen=True)
class Figure:
    """A number that the reader came for: `value` with its unit, and what it counts."""

    value: str
    label: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class KeyFigures:
    """A row of cards."""

    figures: Sequence[Figure]

    def html(self) -> str:
        """One `<div>`."""
        cards = (
            f'<div class="card {one.tone}"><div class="value">{escape(one.value)}</div>'
            f'<div class="label">{escape(one.label)}</div></div>'
            for one in self.figures
        )
        return f'<div class="cards">{"".join(cards)}</div>'


@dataclass(frozen=True)
class Verdict:
    """What came out, in one sentence."""

    text: str
    tone: Tone

    def html(self) -> str:
        """One `<p>`."""
        return f'<p class="verdict {self.tone}">{escape(self.text)}</p>'


@dataclass(frozen=True)
class Advice:
    """What to do, in one sentence, before anything else."""

    text: str

    def html(self) -> str:
        """One `<p>`."""
        return f'<p class="verdict">{escape(self.text)}</p>'


@dataclass(frozen=True)
class Chart:
    """Curves under a heading, and below them what they show."""

    heading: str
    series: Sequence[curves.Series]
    x_label: str
    y_label: str
    caption: str = ""
    log_y: bool = False

    def html(self) -> str:
        """One `<section>`."""
        drawing = curves.line_chart(
            self.series, title=self.heading, x_label=self.x_label, y_label=self.y_label, log_y=self.log_y
        )
        return _section(self.heading, f"<figure>{drawing}</figure>", self.caption)


@dataclass(frozen=True)
class Table:
    """Rows under headings. All columns but the first `text_columns` are numbers, aligned at the right."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    text_columns: int = 1

    def html(self) -> str:
        """One `<section>`."""
        head = "".join(self._cell("th", index, text) for index, text in enumerate(self.columns))
        body = "".join(
            f"<tr>{''.join(self._cell('td', index, text) for index, text in enumerate(row))}</tr>" for row in self.rows
        )
        table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        return _section(self.heading, table, self.caption)

    def _cell(self, tag: str, index: int, text: str) -> str:
        kind = "" if index < self.text_columns else ' class="number"'
        return f"<{tag}{kind}>{escape(text)}</{tag}>"


@dataclass(frozen=True)
class Facts:
    """Names and values: the environment, the settings."""

    heading: str
    facts: Mapping[str, str]

    def html(self) -> str:
        """One `<section>`."""
        pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in self.facts.items())
        return _section(self.heading, f"<dl>{pairs}</dl>", "")


@dataclass(frozen=True)
class Beside:
    """Two sections in one row, where the window is wide enough."""

    left: Section
    right: Section

    def html(self) -> str:
        """One `<div>`."""
        return f'<div class="beside">{self.left.html()}{self.right.html()}</div>'


def render_page(*, title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """The whole document as text, to be written as UTF-8."""
    body = "\n".join(section.html() for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}{curves.STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
{body}
<footer>{escape(footer)}</footer>
</main>
</body>
</html>
"""


def _section(heading: str, content: str, caption: str) -> str:
    below = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return f"<section><h2>{escape(heading)}</h2>{content}{below}</section>"
