"""A list in a file is served, and one that enclaves would refuse does not replace it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from obfuscatune.cluster import list_file
from obfuscatune.cluster.publisher import Publisher
from obfuscatune.errors import DiscoveryError
from obfuscatune.fleet.discovery import fetch
from obfuscatune.fleet.listing import format_list, parse_list
from tests.fleet.lists import member

ONE = format_list([member(0)], ["cpu"])
TWO = format_list([member(0), member(1)], ["cpu", None])


def test_a_process_serves_the_list(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    path.write_bytes(ONE)
    command = [sys.executable, "-m", "obfuscatune.cluster.list_file", "--list", str(path), "--publish", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = process.stderr.readline().split()[-1]
            assert fetch(url) == ONE
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_new_list_replaces_the_old_one_if_it_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_file, "SECONDS_BETWEEN_LOOKS", 0.02)
    path, over, said = tmp_path / "fleet.json", threading.Event(), []
    news = threading.Condition()

    def say(line: str) -> None:
        with news:
            said.append(line)
            news.notify_all()

    path.write_bytes(ONE)
    serving = threading.Thread(
        target=list_file.serve, args=([str(path)], list_file.listen_address("127.0.0.1:0"), over, say)
    )
    serving.start()
    try:
        with news:
            assert news.wait_for(lambda: len(said) == 1, 30)
        url = said[0].split()[-1]
        path.write_bytes(b"{}")
        with news:
            assert news.wait_for(lambda: len(said) == 2, 30)
        assert "malformed" in said[1]
        assert fetch(url) == ONE
        path.unlink()
        with news:
            assert news.wait_for(lambda: len(said) == 3, 30)
        assert fetch(url) == ONE
        path.write_bytes(TWO)
        for _ in range(200):
            if fetch(url) == TWO:
                break
        assert fetch(url) == TWO
    finally:
        over.set()
        serving.join(30)


def test_lists_of_two_operators_become_one(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(ONE)
    other = Publisher(list_file.listen_address("127.0.0.1:0"))
    try:
        other.publish(format_list([member(1, "cloud-b")], ["cuda"]))
        found = list_file.read_lists([str(tmp_path / "one"), f"http://127.0.0.1:{other.address.port}"])
        assert parse_list(found) == (member(0), member(1, "cloud-b"))
        other.publish(ONE)  # one worker of two operators
        with pytest.raises(DiscoveryError, match="twice"):
            list_file.read_lists([str(tmp_path / "one"), f"http://127.0.0.1:{other.address.port}"])
    finally:
        other.close()


def test_a_list_that_is_no_good_is_not_served_at_all(tmp_path: Path) -> None:
    (tmp_path / "fleet.json").write_bytes(b"{}")
    with pytest.raises(DiscoveryError):
        list_file.serve(
            [str(tmp_path / "fleet.json")], list_file.listen_address("127.0.0.1:0"), threading.Event(), print
        )
