"""Text into and out of the process, whatever bytes come in and whatever the terminal can show."""

import codecs
import sys
from io import TextIOWrapper

from obfuscatune.wire.errors import DataError

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
