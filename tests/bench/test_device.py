"""`bench device` on the CPU, with a tiny shape: every comparison is made, and both sides compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from obfuscatune.bench.device import DeviceBench
from obfuscatune.cli.app import run
from obfuscatune.errors import ConfigError
from obfuscatune.protocol.addresses import DeviceAddress


@pytest.fixture
def shape(tmp_path: Path) -> str:
    path = tmp_path / "tiny"
    GPT2Config(n_embd=48, n_head=4, n_layer=2, vocab_size=97, n_positions=64).save_pretrained(path)
    return str(path)


def test_every_comparison(shape: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = ["--shape", shape, "--batch", "1", "--length", "9", "--rounds", "2", "--worker", "device:cpu"]
    chosen = ["--profile", "private,guarded", "--dtype", "float32,bfloat16", "--out", str(tmp_path / "kept"), "--json"]
    assert run(["bench", "device", *sizes, *chosen]) == 0
    shown = json.loads(capfd.readouterr().out)
    (kept,) = (tmp_path / "kept").glob("*.json")
    assert json.loads(kept.read_text()) == shown
    rows = shown["rows"]
    assert [(row["dtype"], row["profile"]) for row in rows] == [
        (dtype, profile) for dtype in ("float32", "bfloat16") for profile in ("private", "guarded")
    ]
    for row in rows:
        assert row["difference"] < (1e-5 if row["dtype"] == "float32" else 0.1)
        assert row["crossings"] == 8  # of two blocks the first stays in the enclave; four layers there and back
        assert row["bytes"] > 0
        assert len(row["ratios"]) == 2
    assert shown["environment"]["device"]
    assert "| bfloat16 | `guarded` | cpu |" in kept.with_suffix(".md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_such_a_device(shape: str) -> None:
    for bench in (DeviceBench(DeviceAddress("cuda"), shape=shape), DeviceBench(DeviceAddress("cpu"), ("cuda:0",))):
        with pytest.raises(ConfigError, match="no CUDA device"):
            bench.run(print)
