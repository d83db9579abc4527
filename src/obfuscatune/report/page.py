"""The document of every report, rendered by one template (templates/).

A section is what a command has to show; the template knows how it looks and not what it means. Numbers are shown as
people read them, with decimal prefixes: 1 kB is 1000 bytes. `environment` says what times depend on: versions,
processor, threads; no host name, and nothing of the user's.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from jinja2 import Environment


def format_bytes(count: float) -> str:
    """`1.23 MB`: three significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{_three_digits(count)} {unit}"
        count /= 1000
    return f"{_three_digits(count)} TB"


def format_count(count: int) -> str:
    """`1,557,611,200`."""
    return f"{count:,}"


def format_share(share: float) -> str:
    """`5.3 %` of a share between 0 and 1."""
    return f"{100 * share:.1f} %"


def format_seconds(seconds: float) -> str:
    """`4.2 s` or `1 min 32 s`."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s"


def format_small(value: float) -> str:
    """A difference: `0` where it is exactly that, else `1.2e-06`."""
    return "0" if value == 0 else f"{value:.1e}"


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


_PACKAGES = ("torch", "transformers", "peft")


def environment(threads: int | None = None) -> dict[str, str]:
    """Names and values, in the order in which they are shown.

    Args:
        threads: torch's, where other processes computed; those of this one if None.
    """
    import torch

    from obfuscatune.machine import cores
    from obfuscatune.version import __version__

    return {
        "obfuscatune": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "processor": _processor(),
        "cores": str(cores()),
        "torch threads": str(threads or torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    """The kernel's name for it, which `platform.processor()` does not give on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


Tone = Literal["plain", "good", "bad"]
_LIGHTEST, _DARKEST = 8, 70
"""Per cent of red in a heat map's cells."""


class Section(Protocol):
    """A part of the page; `kind` says how the template shows it."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Figure:
    """A number that the reader came for: `value` with its unit, and what it counts."""

    value: str
    label: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class KeyFigures:
    """A row of cards."""

    kind: ClassVar[str] = "key figures"
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Verdict:
    """What came out, or what to do, in one sentence."""

    kind: ClassVar[str] = "verdict"
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Paragraph:
    """A text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Table:
    """Rows under headings. All columns but the first `text_columns` are numbers, aligned at the right."""

    kind: ClassVar[str] = "table"
    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    text_columns: int = 1

    def markdown(self) -> str:
        """The table alone, without heading and caption."""
        return markdown_table(self.columns, self.rows, self.text_columns)


@dataclass(frozen=True)
class HeatCell:
    """`text` large, `below` small under it; `heat` from 0 to 1, None where nothing was measured."""

    text: str
    below: str
    heat: float | None
    hint: str = ""

    @property
    def tone(self) -> str:
        """Its class in the style sheet; what was not measured is hatched."""
        return "unknown" if self.heat is None else "good" if self.heat <= 0 else ""

    @property
    def style(self) -> str:
        """Red mixed into the background, the more the hotter."""
        if not self.heat or self.heat <= 0:
            return ""
        share = round(_LIGHTEST + (_DARKEST - _LIGHTEST) * min(1.0, self.heat))
        return f"background: color-mix(in srgb, var(--heat) {share}%, transparent)"


@dataclass(frozen=True)
class HeatMap:
    """A table whose cells are coloured by how bad they are. `rows` are (name, what it is, cells)."""

    kind: ClassVar[str] = "heat map"
    heading: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[HeatCell]]]
    caption: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and values: the environment, the settings."""

    kind: ClassVar[str] = "facts"
    heading: str
    facts: Mapping[str, str]
    caption: str = ""


@dataclass(frozen=True)
class Beside:
    """Two sections in one row, where the window is wide enough."""

    kind: ClassVar[str] = "beside"
    left: Section
    right: Section


def render_page(*, title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """The whole document as text, to be written as UTF-8."""
    page = templates().get_template("page.html")
    return page.render(title=title, subtitle=subtitle, sections=sections, footer=footer).lstrip()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int = 1) -> str:
    """A table in Markdown. All columns but the first `text_columns` are numbers, aligned at the right."""
    marks = ["---" if index < text_columns else "---:" for index in range(len(columns))]
    lines: list[Sequence[object]] = [columns, marks, *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def read_markdown(text: str) -> list[Paragraph | Table]:
    """Paragraphs and tables of a result in Markdown, as our benchmarks write it; code and stress are plain there."""
    found: list[Paragraph | Table] = []
    plain = text.replace("`", "").replace("**", "")
    for block in filter(None, (it.strip() for it in plain.split("\n\n"))):
        lines = block.splitlines()
        if not all(line.startswith("|") for line in lines) or len(lines) < 2:
            found.append(Paragraph(" ".join(lines)))
            continue
        columns, marks, *rows = (_cells_of(line) for line in lines)
        texts = next((index for index, mark in enumerate(marks) if mark.endswith(":")), len(marks))
        found.append(Table("", columns, rows, text_columns=texts))
    return found


def _cells_of(line: str) -> list[str]:
    """Of a row of a table in Markdown."""
    cells = line.strip().removeprefix("|").removesuffix("|").replace("\\|", "\0").split("|")
    return [cell.strip().replace("\0", "|") for cell in cells]


@cache
def templates() -> "Environment":
    """All text in them is escaped, but for the pictures, which escape their own."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(loader=PackageLoader("obfuscatune.report"), autoescape=True, undefined=StrictUndefined)
