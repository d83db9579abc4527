"""What is recorded is what was sent, in order; what lacks something does not pass for a whole transcript."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.client import WorkerClient
from obfuscatune.errors import ProtocolError, StorageError
from obfuscatune.protocol.messages import Header, MessageType
from obfuscatune.protocol.recorder import Recorder
from obfuscatune.protocol.transcript import FRAMES, INDEX, TranscriptEntry, read_transcript
from tests.worker.serving import RawClient, serving

ID = bytes(range(1, 17))
W = torch.arange(12, dtype=torch.float32).reshape(3, 4)
X = torch.arange(6, dtype=torch.float32).reshape(2, 3)
ONE_MULTIPLY = [
    "HELLO",
    "WELCOME",
    "SHARE",
    "DONE",
    "OFFER",
    "WANT",
    "STORE",
    "STORED",
    "MULTIPLY",
    "PRODUCT",
    "FORGET",
    "DONE",
]


def recorded(folder: Path, record: Path, rows: torch.Tensor = X, *, shared: bool = False) -> None:
    """One session that stores W, multiplies `rows`, in shared memory or not, and closes."""
    folder.mkdir()
    with serving(folder, record=record) as worker, WorkerClient.open(str(worker.address)) as link:
        link.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
        link.multiply(ID, link.allocate(*rows.shape, rows.dtype).copy_(rows) if shared else rows, transpose=False)


def types(entries: list[TranscriptEntry]) -> list[str]:
    return [entry.header.type.name for entry in entries]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_read_back_is_what_was_sent(tmp_path: Path, shared: bool, mapped: bool) -> None:
    recorded(tmp_path / "run", tmp_path / "t", shared=shared)
    entries = list(read_transcript(tmp_path / "t", mapped=mapped))
    (tmp_path / "t" / FRAMES).unlink()
    assert types(entries) == ONE_MULTIPLY
    assert [entry.direction for entry in entries] == ["request", "reply"] * 6
    assert len({entry.session for entry in entries}) == 1
    tensors = [entry.tensor for entry in entries if entry.tensor is not None]
    assert all(torch.equal(got, sent) for got, sent in zip(tensors, [W, X, X @ W], strict=True))
    assert {entry.header.matrix_id for entry in entries[4:10]} == {ID}
    times = [entry.at_ns for entry in entries]
    assert times == sorted(times) and 0 < times[0] < times[-1]


def test_frames_are_the_bytes_of_the_wire(tmp_path: Path) -> None:
    recorded(tmp_path / "run", tmp_path / "t")
    frames = (tmp_path / "t" / FRAMES).read_bytes()
    entries = list(read_transcript(tmp_path / "t"))
    lengths = [56 + entry.header.payload_bytes for entry in entries]
    assert len(frames) == sum(length + -length % 8 for length in lengths[:-1]) + lengths[-1]
    assert X.numpy().tobytes() in frames


def test_a_payload_of_32_bytes_is_a_matrix_all_the_same(tmp_path: Path) -> None:
    """As long as the digest of an OFFER, or a WELCOME."""
    recorded(tmp_path / "run", tmp_path / "t", rows=X[:1].repeat(2, 1))
    products = [entry for entry in read_transcript(tmp_path / "t") if entry.header.type is MessageType.PRODUCT]
    assert products[0].header.payload_bytes == 32
    assert products[0].tensor is not None


def test_no_session_id_is_written_down(tmp_path: Path) -> None:
    secret = bytes(range(100, 132))
    with serving(tmp_path, record=tmp_path / "t") as worker, RawClient(worker.address, secret) as client:
        client.hello()
    written = b"".join(path.read_bytes() for path in (tmp_path / "t").iterdir())
    assert secret not in written
    assert secret.hex().encode() not in written


def test_files_are_ours_alone(tmp_path: Path) -> None:
    recorded(tmp_path / "run", tmp_path / "t")
    for path in [tmp_path / "t", *(tmp_path / "t").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_sessions_are_told_apart_and_runs_appended(tmp_path: Path) -> None:
    recorded(tmp_path / "first", tmp_path / "t")
    recorded(tmp_path / "second", tmp_path / "t")
    entries = list(read_transcript(tmp_path / "t"))
    assert types(entries) == 2 * ONE_MULTIPLY
    assert len({entry.session for entry in entries}) == 2


def test_a_transcript_without_its_end_does_not_pass(tmp_path: Path) -> None:
    recorded(tmp_path / "run", tmp_path / "t")
    index = tmp_path / "t" / INDEX
    lines = index.read_text().splitlines(keepends=True)
    for cut in ("".join(lines[:-1]), "".join(lines[:-1])[:-9], ""):
        index.write_text(cut)
        with pytest.raises(StorageError):
            list(read_transcript(tmp_path / "t"))
        assert types(list(read_transcript(tmp_path / "t", allow_cut=True))) in (ONE_MULTIPLY, ONE_MULTIPLY[:-1], [])


def test_a_killed_worker_s_run_can_be_continued_and_stays_marked(tmp_path: Path) -> None:
    recorded(tmp_path / "first", tmp_path / "t")
    index = tmp_path / "t" / INDEX
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1])[:-9])  # half a line, and no end
    recorded(tmp_path / "second", tmp_path / "t")
    with pytest.raises(StorageError):
        list(read_transcript(tmp_path / "t"))
    assert types(list(read_transcript(tmp_path / "t", allow_cut=True))) == ONE_MULTIPLY[:-1] + ONE_MULTIPLY


@pytest.mark.parametrize(
    "damage", ["drop a line", "shorten frames", "change a header", "shift", "another version", "junk"]
)
def test_damage_is_noticed(damage: str, tmp_path: Path) -> None:
    recorded(tmp_path / "run", tmp_path / "t")
    index, frames = tmp_path / "t" / INDEX, tmp_path / "t" / FRAMES
    lines = index.read_text().splitlines()
    if damage == "drop a line":
        del lines[5]
    elif damage == "shorten frames":
        frames.write_bytes(frames.read_bytes()[:-20])
    elif damage == "change a header":
        frames.write_bytes(b"X" + frames.read_bytes()[1:])
    elif damage == "shift":
        lines[4] = json.dumps({**json.loads(lines[4]), "offset": json.loads(lines[4])["offset"] + 1})
    elif damage == "another version":
        lines[0] = lines[0].replace("1", "2")
    else:
        lines[3] = "[1, 2]"
    index.write_text("\n".join(lines) + "\n")
    with pytest.raises((StorageError, ProtocolError)):
        list(read_transcript(tmp_path / "t"))


def test_no_transcript(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        list(read_transcript(tmp_path))


def test_after_a_failure_nothing_is_recorded_and_no_end_is_written(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t")
    recorder.record("request", "label", Header(MessageType.FORGET, 1, ID), b"")
    kept = os.dup(recorder._frames)
    os.close(recorder._frames)
    for _ in range(2):
        with pytest.raises(StorageError, match="incomplete"):
            recorder.record("request", "label", Header(MessageType.FORGET, 2, ID), b"")
    os.dup2(kept, recorder._frames)
    os.close(kept)
    assert recorder.failed
    recorder.close()
    with pytest.raises(StorageError, match="no end"):
        list(read_transcript(tmp_path / "t"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "t").touch()
    with pytest.raises(StorageError, match="cannot record"):
        Recorder(tmp_path / "t")


@pytest.mark.parametrize("name", [FRAMES, INDEX])
def test_no_link_is_followed(tmp_path: Path, name: str) -> None:
    """Into a folder that somebody else prepared."""
    (tmp_path / "t").mkdir()
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "t" / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(StorageError, match="a symbolic link lies there"):
        Recorder(tmp_path / "t")
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
