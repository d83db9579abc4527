"""`obfuscatune worker` and `python -m obfuscatune.worker` are one thing; `keygen` makes keys and overwrites none."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import pytest

from obfuscatune.cli.keygen import keygen
from obfuscatune.cli.options import with_options
from obfuscatune.cli.worker import worker
from obfuscatune.errors import ConfigError
from obfuscatune.option import parse_size
from obfuscatune.protocol.limits import GIB, MIB
from obfuscatune.protocol.tls import PinnedTls, TlsConfig, fingerprint
from obfuscatune.worker.options import WorkerOptions, parse_arguments


def test_both_entries_take_the_same_options_and_defaults() -> None:
    defaults = dataclasses.asdict(WorkerOptions("unix:/x"))
    assert dataclasses.asdict(parse_arguments(["--listen", "unix:/x"])) == defaults
    typed = inspect.signature(with_options(worker)).parameters
    shown = {name: parameter.default for name, parameter in typed.items()}
    assert {"until_stdin_closes": False, **shown, "listen": "unix:/x"} == defaults, "programs use `python -m`"


def test_arguments_are_read_as_what_they_are() -> None:
    given = ["--listen", "unix:/x", "--threads", "2", "--store", "/s", "--quota", "8GiB", "--json"]
    parsed = parse_arguments(given)
    assert parsed == WorkerOptions("unix:/x", threads=2, store=Path("/s"), quota="8GiB", json=True)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * GIB), ("512 MiB", 512 * MIB), ("1000000", 1_000_000), ("2KiB", 2048), ("1TiB", 1024 * GIB)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8GB", "-1", "1.5GiB", "8 gib", "٣"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


def test_keygen_makes_a_pair_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side in ("worker", "enclave"):
        keygen(out=tmp_path / side, name=side, as_json=True)
    made = json.loads(capsys.readouterr().out.split("}\n")[0] + "}")
    assert made["fingerprint"] == fingerprint((tmp_path / "worker" / "cert.pem").read_bytes())
    assert (tmp_path / "worker" / "key.pem").stat().st_mode & 0o777 == 0o600
    files = [tmp_path / "worker" / "cert.pem", tmp_path / "worker" / "key.pem", tmp_path / "enclave" / "cert.pem"]
    PinnedTls(TlsConfig(*files), server=True)


def test_keygen_overwrites_nothing(tmp_path: Path) -> None:
    keygen(out=tmp_path, name="first")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="not overwritten"):
        keygen(out=tmp_path, name="second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_keygen_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        keygen(out=tmp_path / "file")
