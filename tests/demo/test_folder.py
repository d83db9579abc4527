"""The demo writes to a folder of its own, and to no other."""

from pathlib import Path

import pytest

from obfuscatune.demo.settings import claim
from obfuscatune.errors import ConfigError, StorageError


def test_a_new_folder_is_made(tmp_path):
    assert claim(tmp_path / "a" / "b").root == tmp_path / "a" / "b"


def test_an_earlier_demo_is_replaced(tmp_path):
    out = tmp_path / "out"
    claim(out)
    (out / "protected").mkdir()
    (out / "protected" / "recipe.yaml").touch()
    (out / "report.html").touch()
    (out / "mine.txt").touch()
    claim(out)
    assert sorted(path.name for path in out.iterdir()) == [".obfuscatune-demo", "mine.txt"]


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "protected").mkdir()
    with pytest.raises(ConfigError, match="choose another --out"):
        claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["protected"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="choose another --out"):
        claim(tmp_path / "out")


def test_a_place_that_cannot_be_written_is_refused():
    with pytest.raises(StorageError):
        claim(Path("/proc/nowhere/demo"))
