"""`bench rotation` on small matrices: every operation is timed both ways."""

import pytest
import torch

from obfuscatune.bench import rotation
from obfuscatune.bench.rotation import RotationBench
from obfuscatune.enclave import kernels
from obfuscatune.errors import ConfigError


def test_every_operation_is_timed_by_torch_and_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.native_for(torch.empty(512, 512)) is None:
        pytest.skip("no native kernels here; torch computes")
    monkeypatch.setattr(rotation, "_LEAST_SECONDS", 0)
    threads = torch.get_num_threads()
    said: list[str] = []
    measured = RotationBench(dims=(97, 128), rows=(1, 40), threads=1).run(said.append)
    assert torch.get_num_threads() == threads
    rotating, mixing = ("rotate", "undo rotation"), ("mix", "undo mixing")
    expected = [(n, dim, what) for n in (1, 40) for dim in (97, 128) for what in rotating + (mixing if n > 1 else ())]
    assert [(row.rows, row.dim, row.what) for row in measured.rows] == expected
    assert all(row.torch_seconds > 0 < row.kernel_seconds for row in measured.rows)
    assert len(measured.as_markdown().splitlines()) == 4 + len(expected)
    assert len(measured.as_json()["rows"]) == len(expected)
    assert len(said) == 1 + 4


def test_without_kernels_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "native_for", lambda x: None)
    with pytest.raises(ConfigError, match=r"install with a C\+\+ compiler"):
        RotationBench().run(lambda line: None)
