"""Bytes that are no text, and terminals that cannot show all of it."""

import io
import json
import os
import subprocess
import sys

import pytest

from obfuscatune.cli import output
from obfuscatune.errors import DataError


@pytest.fixture
def piped(monkeypatch):
    """Standard input that holds these bytes."""

    def pipe(content, encoding="utf-8"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding=encoding))
        output.settle_streams()

    return pipe


@pytest.fixture
def terminal(monkeypatch):
    """Standard output of an encoding; what was written to it."""

    def use(encoding):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
        output.settle_streams()
        return written

    return use


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_input_is_utf8_with_or_without_a_mark(piped, encoding):
    piped("café\n".encode(), encoding)
    assert output.read_input() == "café\n"
    piped(b"\xef\xbb\xbfone\r\ntwo\0\r\n", encoding)
    assert output.read_input_line(1) == "one\n"
    assert output.read_input_line(2) == "two\0\n"
    assert output.read_input_line(3) == ""


def test_input_that_is_no_text_is_refused(piped, monkeypatch):
    piped(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"^standard input: not UTF-8: byte 0xe9 after 3 characters$"):
        output.read_input()
    piped(b"fine\ncaf\xe9\n")
    output.read_input_line(1)
    with pytest.raises(DataError, match=r"^standard input, line 2: not UTF-8: byte 0xe9"):
        output.read_input_line(2)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xe9"), encoding="ascii"))
    with pytest.raises(DataError, match=r"^standard input: not ASCII: byte 0xe9"):
        output.read_input()


def test_input_without_end_is_refused(piped, monkeypatch):
    monkeypatch.setattr(output, "LONGEST_INPUT", 10)
    piped(b"a" * 11)
    with pytest.raises(DataError, match="longer than 10 characters"):
        output.read_input()
    piped(b"a" * 11)
    with pytest.raises(DataError, match="line 1: longer than 10 characters"):
        output.read_input_line(1)


@pytest.mark.parametrize(("text", "found"), [("caf\udce9", "byte 0xe9"), ("a\ud800", "half of a surrogate pair")])
def test_an_argument_that_is_no_text_is_refused(text, found):
    with pytest.raises(DataError, match=f"^--prompt: not UTF-8: {found} after"):
        output.checked_text(text, "--prompt")


def test_an_ascii_terminal_gets_lookalikes_and_escapes(terminal):
    written = terminal("ascii")
    output.write_text(f"{output.sparkline([1, 2, 3, 4, 5, 6, 7, 8])} café → 3× ⠋ 漢\udce9")
    assert written.getvalue() == rb"_.,-=+*# caf\xe9 -> 3x : \u6f22\udce9" + b"\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_every_encoding(terminal, encoding):
    written = terminal(encoding)
    document = {"text": "café 漢", "path": "caf\udce9"}
    output.write_json(document)
    assert json.loads(written.getvalue().decode(encoding)) == document


@pytest.mark.parametrize("command", [("generate", "--prompt", "caf\udce9"), ("chat", "--system", "caf\udce9")])
def test_a_command_refuses_it_before_a_model_is_read(obfuscatune, command):
    ran = obfuscatune(*command, "--model", "/nowhere")
    assert ran.code == 1
    assert ran.stderr.splitlines()[-1] == f"error: {command[1]}: not UTF-8: byte 0xe9 after 3 characters"


@pytest.mark.long
def test_the_command_itself_on_an_ascii_terminal():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [
        sys.executable,
        "-m",
        "obfuscatune",
        "generate",
        "--plain",
        "--max-new-tokens",
        "2",
        "--prompt",
        "café →",
    ]
    ran = subprocess.run(command, env=environment, capture_output=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(rb"caf\xe9 ->")
