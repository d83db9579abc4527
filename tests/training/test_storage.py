"""Files that are whole or absent, on disks that refuse."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from obfuscatune.errors import ConfigError, StorageError
from obfuscatune.training.storage import RunDirectory


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
from obfuscatune.training.storage import RunDirectory
from obfuscatune.errors import StorageError
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


@pytest.fixture
def others_file(tmp_path):
    """What must stay as it is, whatever leads to it."""
    (tmp_path / "others").mkdir()
    (tmp_path / "others/file").write_bytes(b"theirs")
    yield tmp_path / "others/file"
    assert contents(tmp_path / "others") == {"file": b"theirs"}


@pytest.mark.parametrize("name", [".lock", "log", "run.json"])
def test_no_link_is_followed(name, directory, others_file):
    """Into a folder that somebody else prepared."""
    (directory.root / name).symlink_to(others_file)
    refused = pytest.raises(StorageError, match=f"{name} is a symbolic link, which is not followed: .* remove it")
    if name == ".lock":
        with refused, directory.locked():
            pass
    elif name == "log":
        with refused:
            directory.append(name, b"ours")
    else:
        with refused:
            directory.read(name)
        directory.write_file(name, b"ours")  # takes the link's place
        assert directory.read(name) == b"ours"


def test_no_folder_is_reached_by_a_link(directory, others_file):
    (directory.root / "checkpoints").symlink_to(others_file.parent)
    for act, *arguments in (
        (directory.write_directory, "checkpoints/a", {"x": b""}),
        (directory.write_file, "checkpoints/file", b""),
        (directory.append, "checkpoints/file", b""),
        (directory.read, "checkpoints/file"),
        (directory.remove_directory, "checkpoints/file"),
    ):
        with pytest.raises(StorageError, match="checkpoints is a symbolic link"):
            act(*arguments)


@pytest.mark.parametrize("kind", ["file", "link to a file", "link to a folder", "dangling link", "folder"])
def test_what_lies_where_drafts_are_written_is_removed_and_not_followed(kind, directory, others_file):
    for name in (".unfinished-a", ".discarded-a"):
        path = directory.root / name
        if kind == "file":
            path.write_bytes(b"half")
        elif kind == "folder":
            path.mkdir()
            (path / "x").write_bytes(b"half")
        else:
            leads_to = {"link to a file": others_file, "link to a folder": others_file.parent}
            path.symlink_to(leads_to.get(kind, others_file.with_name("absent")))
    directory.write_directory("a", {"x": b"1"})
    directory.write_directory("a", {"x": b"2"})
    assert contents(directory.root) == {"a/x": b"2"}
    directory.remove_directory("a")
    (directory.root / ".unfinished-a").symlink_to(others_file)
    directory.write_file("a", b"3")
    (directory.root / ".unfinished-b").symlink_to(others_file.parent)
    directory.clean()
    assert contents(directory.root) == {"a": b"3"}
    assert [path.name for path in directory.root.iterdir()] == ["a"]


def test_a_pipe_is_refused_at_once(directory):
    os.mkfifo(directory.root / "log")
    with pytest.raises(StorageError, match="log: the disk refused"):
        directory.append("log", b"")
    with pytest.raises(StorageError, match="log: the disk refused: this is no regular file"):
        directory.read("log")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_said_and_used(code, directory, monkeypatch, caplog):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with directory.locked():
        pass
    (record,) = caplog.records
    assert f"{directory.root}: this file system has no locks" in record.getMessage()


def test_a_lock_that_fails_otherwise_is_a_refusal(directory, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=r"\.lock: the disk refused: Input/output error"), directory.locked():
        pass


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_is_used(code, directory, monkeypatch):
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    directory.write_file("a", b"1")
    directory.write_directory("b", {"x": b"2"})
    assert contents(directory.root) == {"a": b"1", "b/x": b"2"}
