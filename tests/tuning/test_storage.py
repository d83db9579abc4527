"""Files that are whole or absent, on disks that refuse."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from obfuscatune.tuning.storage import RunDirectory
from obfuscatune.wire.errors import ConfigError, StorageError


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def full_disk(monkeypatch):
    """From now on, files can be opened but nothing more is written to them durably."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill() -> None:
        monkeypatch.setattr(os, "fsync", refuse)

    return fill


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_files_and_directories_are_written_and_replaced(directory):
    for content in (b"one", b"two"):
        directory.write_file("a.json", content)
        directory.write_directory("deep/er/b", {"x": content, "y": b""})
        directory.append("log", content)
    assert contents(directory.root) == {"a.json": b"two", "deep/er/b/x": b"two", "deep/er/b/y": b"", "log": b"onetwo"}
    assert directory.read("a.json") == b"two"
    directory.remove_directory("deep/er/b")
    assert not (directory.root / "deep/er/b").exists()


def test_a_directory_is_made_for_its_owner_alone(directory):
    assert directory.root.stat().st_mode & 0o777 == 0o700


def test_a_full_disk_leaves_what_was_there(directory, full_disk):
    directory.write_file("a.json", b"old")
    directory.write_directory("b", {"x": b"old"})
    before = contents(directory.root)
    full_disk()
    with pytest.raises(StorageError, match=r"a.json: the disk refused: No space left on device"):
        directory.write_file("a.json", b"new")
    with pytest.raises(StorageError, match=r"b: the disk refused: No space left on device"):
        directory.write_directory("b", {"x": b"new", "y": b"new"})
    assert contents(directory.root) == before


def test_a_file_size_limit_of_the_system_is_a_refusal(tmp_path):
    script = """
import resource, sys
from pathlib import Path
from obfuscatune.tuning.storage import RunDirectory
from obfuscatune.wire.errors import StorageError
directory = RunDirectory(Path(sys.argv[1]))
directory.write_directory("b", {"x": bytes(1000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    directory.write_directory("b", {"x": bytes(1000), "y": bytes(3000)})
except StorageError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert "b: the disk refused: File too large" in result.stdout
    assert contents(tmp_path) == {"b/x": bytes(1000)}


def test_what_cannot_be_made_read_or_appended_is_refused(tmp_path, directory):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="the disk refused"):
        RunDirectory(tmp_path / "file")
    with pytest.raises(StorageError, match="the disk refused: No such file"):
        directory.read("absent")
    (directory.root / "folder").mkdir()
    with pytest.raises(StorageError, match="the disk refused: Is a directory"):
        directory.append("folder", b"")
    with pytest.raises(StorageError, match="the disk refused"):
        directory.remove_directory("absent")


def test_what_a_killed_process_left_is_cleaned_and_nothing_else(directory):
    directory.write_directory("checkpoints/step-1", {"x": b"1"})
    before = contents(directory.root)
    (directory.root / "checkpoints/.unfinished-step-2").mkdir()
    (directory.root / "checkpoints/.unfinished-step-2/x").write_bytes(b"half")
    (directory.root / "checkpoints/.discarded-step-0").mkdir()
    (directory.root / ".unfinished-run.json").write_bytes(b"half")
    directory.clean()
    assert contents(directory.root) == before
    assert sorted(path.name for path in directory.root.rglob("*")) == ["checkpoints", "step-1", "x"]


def test_one_process_at_a_time(directory):
    other = RunDirectory(directory.root)
    with directory.locked(), pytest.raises(ConfigError, match="another run is writing"), other.locked():
        pass
    with directory.locked():
        pass
