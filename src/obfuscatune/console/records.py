"""A JSON Lines file as the service reads it: which of its lines cannot be used, and why. All of them at once.

The reader is the service's own; it runs here before anything leaves this machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from obfuscatune.console.pages import text
from obfuscatune.errors import DataError
from obfuscatune.training.data_files import MAX_LINE_BYTES, Completion, Record, parse_jsonl_line
from obfuscatune.training.layouts import UPLOADED_LAYOUTS, Format, detect_format

MOST_FILE_BYTES = 100 * 2**20
"""A service's own limit, by default."""
MOST_FAULTS = 100
"""That are shown."""
_SHOWN = 3
_MOST_CHARACTERS = 280
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Fault:
    """A line that cannot be used."""

    line: int
    reason: str


@dataclass(frozen=True)
class Turn:
    """Who says what, cut to what a page shows. `role` is empty for running prompts."""

    role: str
    content: str


@dataclass(frozen=True)
class Checked:
    """What a file holds."""

    records: int
    layout: str
    faults: tuple[Fault, ...]
    """The first of them."""
    faulty: int
    """How many there are."""
    samples: tuple[tuple[Turn, ...], ...]

    @property
    def is_usable(self) -> bool:
        """Whether the service takes it."""
        return self.records > 0 and not self.faulty


def check_records(content: bytes) -> Checked:
    """Read every line of a file."""
    found: Format | None = None
    faults: list[Fault] = []
    samples: list[tuple[Turn, ...]] = []
    records = faulty = 0
    for number, raw in _lines(content):
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(text("error.line_long", most=f"{MAX_LINE_BYTES:,}"))
            line = parse_jsonl_line(str(number), raw)
            if found is None:
                detected = detect_format(line)
                if detected.layout.name not in UPLOADED_LAYOUTS:
                    raise DataError(text("error.line_form"))
                found = detected
            record = found.read(line)
        except DataError as error:
            faulty += 1
            if len(faults) < MOST_FAULTS:
                faults.append(Fault(number, str(error).removeprefix(f"{number}: ")))
            continue
        records += 1
        if len(samples) < _SHOWN:
            samples.append(_shown(record))
    layout = "" if found is None else found.layout.name
    return Checked(records, layout, tuple(faults), faulty, tuple(samples))


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, by number. Lines end at LF alone."""
    begin, number = len(_BOM) if content.startswith(_BOM) else 0, 0
    while begin < len(content):
        end = content.find(b"\n", begin)
        end = len(content) if end < 0 else end
        number += 1
        raw = content[begin:end]
        if raw.strip():
            yield number, raw
        begin = end + 1


def _shown(record: Record) -> tuple[Turn, ...]:
    if isinstance(record, Completion):
        return Turn("prompt", _cut(record.prompt)), Turn("completion", _cut(record.completion))
    messages = getattr(record, "messages", ())
    return tuple(Turn(it.role, _cut(it.content)) for it in messages[:4])


def _cut(content: str) -> str:
    return content if len(content) <= _MOST_CHARACTERS else content[:_MOST_CHARACTERS] + "…"
