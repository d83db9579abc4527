"""A recorded run lies on the disk, and in memory what is being looked at: a real model's has more than ten GB."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from obfuscatune.audit.attacks.view import WorkerView
from obfuscatune.audit.parties import Party, part_views
from obfuscatune.audit.record import RowsFile
from obfuscatune.bench.processes import MemorySampler
from obfuscatune.enclave.masks import DEVIATION, GRID
from obfuscatune.errors import StorageError
from obfuscatune.protocol.messages import Header, MessageType
from obfuscatune.protocol.recorder import Recorder
from obfuscatune.protocol.tensors import DType, bytes_of
from obfuscatune.protocol.transcript import read_transcript

ID = bytes(range(16))
CALLS, ROWS, WIDTH = 600, 64, 256
RECORDED = 8 * CALLS * ROWS * WIDTH
MOST_PER_BYTE = 0.1
"""Memory that a recorded byte may take. Of 79 MB of each worker, a tenth is far above what reading needs."""
W_STAR = torch.eye(WIDTH)


def normal(seed: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def record(folder: Path, masked: bool) -> None:
    """Calls of float64 rows, after a message of 36 bytes, as a worker records them."""
    recorder = Recorder(folder)
    recorder.record("request", "s", Header(MessageType.HELLO, payload_bytes=36), bytes(36))
    store = Header(MessageType.STORE, 1, ID, DType.FLOAT32, WIDTH, WIDTH, W_STAR.nbytes)
    recorder.record("request", "s", store, bytes_of(W_STAR))
    for call in range(CALLS):
        rows = (DEVIATION * normal(call) / GRID).floor() * GRID + masked * normal(-1 - call).sign()
        header = Header(
            MessageType.MULTIPLY, 2 + call, ID, DType.FLOAT64, ROWS, WIDTH, rows.nbytes, reply_dtype=DType.FLOAT64
        )
        recorder.record("request", "s", header, bytes_of(rows))
    recorder.close()


def test_transcripts_stay_on_the_disk(tmp_path: Path) -> None:
    for party, masked in (("compute", True), ("mask", False)):
        record(tmp_path / party, masked)
    before = anonymous()
    with MemorySampler() as memory:
        compute, masks = (
            WorkerView.from_entries(read_transcript(tmp_path / party, mapped=True)) for party in ("compute", "mask")
        )
        views = part_views(compute, masks)
        for call in views[Party.BOTH].calls:
            assert float(call.rows.square().mean().sqrt()) == pytest.approx(1.0)
    assert memory.anonymous_bytes - before < MOST_PER_BYTE * 2 * RECORDED


def test_plain_rows_stay_on_the_disk(tmp_path: Path) -> None:
    before = anonymous()
    with MemorySampler() as memory:
        rows = RowsFile(tmp_path / "new" / "plain.bin")
        for call in range(CALLS):
            rows.append(normal(call).float())
        kept = rows.mapped()
        (tmp_path / "new" / "plain.bin").unlink()
        assert len(kept) == CALLS
        for call, it in enumerate(kept):
            assert torch.equal(it, normal(call).float().double())
    assert memory.anonymous_bytes - before < MOST_PER_BYTE * RECORDED


def test_a_disk_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot keep rows"):
        RowsFile(tmp_path / "file" / "plain.bin")


def anonymous() -> int:
    with MemorySampler() as memory:
        pass
    return memory.anonymous_bytes
