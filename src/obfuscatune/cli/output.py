"""What users see: progress and notices on stderr, results on stdout, with `--json` one document and nothing else.

Text goes in and out whatever bytes come and whatever the terminal can show.
"""

import codecs
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from obfuscatune.errors import ConfigError, DataError
from obfuscatune.protocol.files import write_new
from obfuscatune.report.page import format_bytes

LONGEST_INPUT = 16 * 2**20
"""Characters that are read of standard input at a time; more is refused."""
_BOM = "\ufeff"
_ERRORS = "obfuscatune.lookalikes"
_LOOKALIKES = dict(zip("▁▂▃▄▅▆▇█", "_.,-=+*#", strict=True)) | {
    **dict.fromkeys("─━╸╺╴╶−–—", "-"),
    **dict.fromkeys("│┃┤├", "|"),
    **dict.fromkeys("└┘┌┐╭╮╰╯┴┬┼", "+"),
    **dict.fromkeys("“”", '"'),
    **dict.fromkeys("‘’", "'"),
    **{"…": "...", "→": "->", "×": "x", "±": "+-", "•": "*", "·": ".", "µ": "u"},
}
_BRAILLE = range(0x2800, 0x2900)


def settle_streams() -> None:
    """Let standard output and error print all text, and standard input read all bytes.

    What the output's encoding lacks becomes something alike in ASCII, or an escape such as `\\xe9`. Input that is
    no text is told by `read_input` and `read_input_line`.
    """
    codecs.register_error(_ERRORS, _look_alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)
    if isinstance(sys.stdin, TextIOWrapper):
        ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="surrogateescape")


def shows_unicode() -> bool:
    """Whether standard output can show every character."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


def read_input() -> str:
    """All of standard input.

    Raises:
        DataError: it is no text, or longer than `LONGEST_INPUT`.
    """
    return _read("standard input", whole=True).removeprefix(_BOM)


def read_input_line(number: int) -> str:
    """The next line of standard input, which is number `number`; empty where it has ended.

    Raises:
        DataError: as `read_input`.
    """
    text = _read(f"standard input, line {number}", whole=False)
    return text.removeprefix(_BOM) if number == 1 else text


def checked_text(text: str, what: str) -> str:
    """The text itself, if it is one: Python hands on bytes that are not UTF-8 as halves of surrogate pairs.

    Args:
        what: What to call it in an error message.

    Raises:
        DataError: it is none.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        found = f"byte {byte:#04x}" if 0x80 <= byte <= 0xFF else "half of a surrogate pair"
        raise DataError(f"{what}: not UTF-8: {found} after {error.start} characters") from error
    return text


def _read(what: str, *, whole: bool) -> str:
    read = sys.stdin.read if whole else sys.stdin.readline
    try:
        text = read(LONGEST_INPUT + 1)
    except UnicodeDecodeError as error:
        raise DataError(f"{what}: not {error.encoding.upper()}: byte {error.object[error.start]:#04x}") from error
    if len(text) > LONGEST_INPUT:
        raise DataError(f"{what}: longer than {LONGEST_INPUT} characters")
    return checked_text(text, what)


def _look_alike(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: what is printed in place of characters that the encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_in_ascii(character) for character in lacking), error.end


def _in_ascii(character: str) -> str:
    if ord(character) in _BRAILLE:
        return ":"
    return _LOOKALIKES.get(character) or character.encode("ascii", "backslashreplace").decode()


_BARS = "▁▂▃▄▅▆▇█"
_SECONDS_BEFORE_A_LINE = 2.0
_SECONDS_BETWEEN_LINES = 5.0


def stderr() -> Console:
    """The console for progress and notices."""
    return Console(stderr=True, highlight=False)


def write_json(document: object) -> None:
    """Print the one document of `--json`. NaN, which JSON has not, becomes null."""
    sys.stdout.write(json.dumps(_without_nan(document), indent=2, ensure_ascii=not shows_unicode()) + "\n")


def write_text(text: str) -> None:
    """Print a result for people."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_result(document: object, text: str, *, as_json: bool) -> None:
    """Print a result: the document with --json, else the text."""
    if as_json:
        write_json(document)
    else:
        write_text(text)


def labelled(values: Mapping[str, object]) -> str:
    """Names and values, a line for each."""
    width = max(map(len, values), default=0)
    return "\n".join(f"{label:<{width}} {printable(value)}" for label, value in values.items())


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file of the user's, which must not be there yet.

    Raises:
        ConfigError: it is, or it cannot be written.
    """
    try:
        write_new(path, content, mode)
    except FileExistsError:
        raise ConfigError(f"{path} exists and is not overwritten: choose another name, or remove it") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def write_part(text: str) -> None:
    """Print a piece of a result, as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def ask(text: str) -> None:
    """Ask for input."""
    sys.stderr.write(text)
    sys.stderr.flush()


def notice(text: str) -> None:
    """Say something that is no result and no error."""
    stderr().print(text, markup=False, soft_wrap=True)


def warn_plain() -> None:
    """Say that a run protects nothing."""
    stderr().print(
        "PLAIN RUN: nothing is protected. Model and text lie open on this machine; for comparison only.",
        style="bold yellow",
        soft_wrap=True,
    )


def warn_as_published() -> None:
    """Say that the paper's scheme hides less than our own."""
    stderr().print(
        "PROFILE paper: the scheme as published. It hides less than private: a worker sees which rows are equal, "
        "and q, k, v and the MLP's inner values as they are (docs/paper.md).",
        style="bold yellow",
        soft_wrap=True,
    )


class Meter(Protocol):
    """Progress of something that takes more than a moment."""

    def expect(self, total: int) -> None:
        """Say how many units there are in all."""

    def begin(self, stage: str) -> None:
        """Name a stage that takes long: beside the bar, or on a line of its own at once."""

    def advance(self, done: int, note: str = "") -> None:
        """Count units done since the last call, with a note to show beside them."""


@contextmanager
def progress(what: str) -> Iterator[Meter]:
    """Show progress while the `with` lasts: a bar on a terminal, else a line every few seconds, the first after two."""
    console = stderr()
    if not console.is_terminal:
        yield _Lines(what)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bar(bars, bars.add_task(what, total=None, note=""))


class _Bar:
    """On a terminal."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def expect(self, total: int) -> None:
        self._bars.update(self._task, total=total)

    def begin(self, stage: str) -> None:
        self._bars.update(self._task, note=stage)

    def advance(self, done: int, note: str = "") -> None:
        self._bars.update(self._task, advance=done, note=note)


class _Lines:
    """For logs and pipes."""

    def __init__(self, what: str) -> None:
        self._what, self._of, self._done = what, "", 0
        self._next = time.monotonic() + _SECONDS_BEFORE_A_LINE

    def expect(self, total: int) -> None:
        self._of = f"/{total}"

    def begin(self, stage: str) -> None:
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
        notice(f"{self._what}: {stage}")

    def advance(self, done: int, note: str = "") -> None:
        self._done += done
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
            notice(f"{self._what}: {self._done}{self._of} {note}".rstrip())


def readable_link(link: Mapping[str, int | float]) -> str:
    """What crossed to the worker and back, in one line."""
    return (
        f"{link['crossings']:,} crossings to the worker: {format_bytes(link['bytes_sent'])} sent, "
        f"{format_bytes(link['bytes_received'])} received, {link['seconds_waiting']:.1f} s waited"
    )


def readable_masks(masks: Mapping[str, Any]) -> str:
    """What was sent under masks, and what it can have shown, in one line."""
    return (
        f"{masks['rows']:,} rows under masks: whoever has all that the worker saw tells two texts apart with an "
        f"advantage of at most {masks['advantage']:.2g} over guessing (budget {masks['budget']:g}); "
        f"{masks['ahead']:,} masks ready, {masks['awaited']:,} awaited, {masks['seconds_waiting']:.1f} s waited"
    )


def sparkline(values: Sequence[float], width: int = 30) -> str:
    """A curve of the last values in one line: each bar the mean of an equal share of them."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(index * len(values) / width) for index in range(width + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def printable(value: object) -> str:
    """Another's words in one line, without what a terminal would obey."""
    return "".join(it if it.isprintable() else "?" for it in str(value))
