"""Results that are kept, and one held against the last that was kept of the same work on the same kind of machine.

Times change with a machine's mood, ratios of one run much less: ratios are what is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obfuscatune.bench.link import LinkSettings
from obfuscatune.errors import ConfigError
from obfuscatune.report.page import Facts, Section, markdown_table, read_markdown, render_page
from obfuscatune.training.storage import RunDirectory

if TYPE_CHECKING:
    from obfuscatune.report.charts import Bars, Chart

_WORK = ("work", "shape", "layers", "batch", "length", "threads")
_MACHINE = ("processor", "cores", "system")


def keep(folder: Path, name: str, document: dict[str, Any], markdown: str, picture: Bars | Chart | None = None) -> Path:
    """Write a file of each kind under one name: JSON, Markdown, HTML, SVG; the JSON file's path.

    Raises:
        StorageError: the folder cannot be written to.
    """
    path = folder / f"{name}.json"
    files = {".json": json.dumps(document, indent=1) + "\n", ".md": markdown}
    files[".html"] = make_page(name, document, markdown, picture)
    if picture is not None:
        files[".md"] = f"{markdown}\n![the same as a picture]({name}.svg)\n"
        files[".svg"] = picture.svg(alone=True) + "\n"
    directory = RunDirectory(folder)
    for suffix, text in files.items():
        directory.write_file(path.with_suffix(suffix).name, text.encode())
    return path


def make_page(name: str, document: Mapping[str, Any], markdown: str, picture: Bars | Chart | None = None) -> str:
    """A result as an HTML page that loads nothing, in the look of our other reports."""
    sections: list[Section] = [*read_markdown(markdown)]
    if picture is not None:
        sections.append(picture)
    environment = document.get("environment")
    if isinstance(environment, Mapping) and environment:
        sections.append(Facts("Measured on", {str(key): str(value) for key, value in environment.items()}))
    return render_page(title="Benchmark", subtitle=name, sections=sections, footer="obfuscatune bench")


@dataclass(frozen=True)
class Comparison:
    """One profile's ratio of protected to plain, now and then."""

    profile: str
    now: float
    kept: float | None
    """None where no result of the same work and machine was kept."""
    file: str = ""

    @property
    def change(self) -> float:
        """0.03 is 3 % slower than what was kept."""
        return 0.0 if self.kept is None else self.now / self.kept - 1

    def is_worse(self, margin: float) -> bool:
        """Whether the ratio grew by more than the margin."""
        return self.change > margin

    def verdict(self, margin: float) -> str:
        """In a word."""
        if self.kept is None:
            return "nothing kept"
        return "worse" if self.is_worse(margin) else "better" if self.change < -margin else "the same"


def read_result(path: Path) -> dict[str, Any]:
    """A JSON file that `bench step`, `forward` or `decode` wrote.

    Raises:
        ConfigError: it is none.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no result of `obfuscatune bench`: {error}") from error
    if not _has_ratios(document):
        raise ConfigError(f"{path} has no ratios: give a file that `bench step`, `forward` or `decode` wrote")
    found: dict[str, Any] = document
    return found


def compare(document: Mapping[str, Any], kept: Path, *, but: Path | None = None) -> list[Comparison]:
    """Every profile of a result beside the newest file in the folder `kept` that has the same.

    Files are newest first by their names, which begin with the date. `but` is left out: the result's own file.

    Raises:
        ConfigError: nothing was kept of any of its profiles, so that nothing would be compared.
    """
    files = [(path, found) for path in sorted(kept.glob("*.json"), reverse=True) for found in _read(path, but)]
    same = [(path, found) for path, found in files if _key(found) == _key(document)]
    found = [_compared(profile, side["ratio"], same) for profile, side in document["protected"].items()]
    if all(one.kept is None for one in found):
        raise ConfigError(
            f"{kept} holds no result of this work on this kind of machine: keep one by --out {kept}, then compare"
        )
    return found


def as_markdown(comparisons: Sequence[Comparison], margin: float) -> str:
    """A table, and what the margin was."""
    rows = []
    for one in comparisons:
        kept, change = ("", "") if one.kept is None else (f"{one.kept:.3f}", f"{one.change:+.1%}")
        rows.append((f"`{one.profile}`", f"{one.now:.3f}", kept, change, one.verdict(margin), one.file))
    table = markdown_table(("profile", "ratio now", "kept", "change", "", "kept in"), rows)
    return f"{table}\n\nWithin {margin:.0%} either way counts as the same.\n"


def _read(path: Path, but: Path | None) -> Iterator[dict[str, Any]]:
    """Nothing of files that are something else: the folder holds results of every command."""
    if but is not None and path.resolve() == but.resolve():
        return
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if _has_ratios(document):
        yield document


def _has_ratios(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("protected"), dict) and "work" in document["bench"]


def _key(document: Mapping[str, Any]) -> tuple[Any, ...]:
    link = LinkSettings(**document["bench"].get("link", {}))  # results before 2026-11-29 are of the default
    return (*(document["bench"][name] for name in _WORK), link, *_machine(document))


def _machine(document: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(document["environment"][name] for name in _MACHINE)


def _compared(profile: str, ratio: float, same: Sequence[tuple[Path, dict[str, Any]]]) -> Comparison:
    for path, document in same:
        if profile in document["protected"]:
            return Comparison(profile, ratio, document["protected"][profile]["ratio"], path.name)
    return Comparison(profile, ratio, None)
