"""Key files: whole or absent, for one user; refused where another could have read them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from obfuscatune.errors import ConfigError
from obfuscatune.protocol.files import read_secret, read_trusted, write_new

OURS, OTHERS = os.geteuid(), 12345


def written(folder: Path) -> Path:
    write_new(folder / "key", b"secret")
    return folder / "key"


def owned_by(user: int, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that is read next says that it is that user's."""
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        return os.stat_result((0o100000 | mode, *found[1:4], user, *found[5:]))

    monkeypatch.setattr(os, "fstat", fstat)


def test_it_is_read_back_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_secret(path, "key file") == b"secret"
    assert [found.name for found in tmp_path.iterdir()] == ["key"]
    (tmp_path / "link").symlink_to(path)
    assert read_secret(tmp_path / "link", "key file") == b"secret"  # as secrets are mounted into a container


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602, 0o610, 0o777])
def test_open_to_others(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"^key file {path} is open to others .*{mode:04o}.* chmod 600 {path}$"):
        read_secret(path, "key file")


def test_another_users_is_refused_whatever_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    owned_by(OTHERS, 0o600, monkeypatch)
    with pytest.raises(ConfigError, match=r"belongs to another user \(uid 12345\)"):
        read_secret(path, "key file")


@pytest.mark.parametrize(("mode", "taken"), [(0o600, True), (0o640, True), (0o644, False), (0o660, False)])
def test_roots_may_be_lent_to_our_group(
    tmp_path: Path, mode: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: OTHERS)
    owned_by(0, mode, monkeypatch)
    if taken:
        assert read_secret(path, "key file") == b"secret"
    else:
        with pytest.raises(ConfigError, match="chmod 600"):
            read_secret(path, "key file")


def test_what_says_whom_to_trust_is_not_everybodys_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    for mode, taken in ((0o644, True), (0o664, True), (0o666, False)):
        path.chmod(mode)
        if taken:
            assert read_trusted(path, "peer certificate") == b"secret"
        else:
            with pytest.raises(ConfigError, match=rf"^peer certificate {path} can be changed .* chmod 644 {path}$"):
                read_trusted(path, "peer certificate")
    owned_by(OTHERS, 0o644, monkeypatch)
    with pytest.raises(ConfigError, match=r"belongs to another user .* who may change what it says"):
        read_trusted(path, "peer certificate")


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="no regular file"):
        read_secret(tmp_path / "pipe", "key file")


def test_nothing_is_overwritten_nor_written_through_a_link(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for taken in (path, tmp_path / "nowhere"):
        with pytest.raises(FileExistsError):
            write_new(taken, b"other")
    assert path.read_bytes() == b"secret"
    assert not (tmp_path / "absent").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_new(tmp_path / "key", b"secret")
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    path = written(tmp_path)
    with pytest.raises(FileExistsError):
        write_new(path, b"other")
    assert read_secret(path, "key file") == b"secret"
    assert [found.name for found in tmp_path.iterdir()] == ["key"]
