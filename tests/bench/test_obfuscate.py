"""`bench obfuscate` on a tiny shape: real files, a real process that loads them, a real worker."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from obfuscatune.bench import obfuscate
from obfuscatune.bench.kept_memory import AHEAD_BYTES, PART_BYTES, KeptMemory
from obfuscatune.bench.obfuscate import ObfuscateBench, ObfuscateResult, write_random_checkpoint
from obfuscatune.bench.processes import cpu_seconds, peak_bytes, settled_bytes
from obfuscatune.errors import ConfigError, StorageError
from obfuscatune.protocol.limits import SHARED_BYTES

CONFIG = GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64, n_positions=32)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> ObfuscateResult:
    folder = tmp_path_factory.mktemp("shape")
    CONFIG.save_pretrained(folder)
    shape = str(folder / "config.json")
    return ObfuscateBench(shape=shape, transforms=("structured",), threads=1, rounds=1).run(lambda line: None)


@pytest.mark.long
def test_everything_is_counted_once(measured: ObfuscateResult) -> None:
    best = measured.best("structured")
    block = 32 * (96 + 32 + 128 + 128)  # the matrices of one block; that of the first block stays
    assert best["bytes_uploaded"] == 4 * block
    assert best["matrices"] == 4
    assert best["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_config(CONFIG).parameters())
    assert best["enclave_parameters"] == best["parameters"] - block
    assert set(best["stages"]) == {"reading", "transforming", "sending"}
    assert min(best["stages"].values()) > 0
    assert best["enclave_peak_bytes"] > best["enclave_bytes"]


@pytest.mark.long
def test_its_documents_name_what_they_depend_on(measured: ObfuscateResult) -> None:
    document = json.loads(json.dumps(measured.as_json()))
    assert document["environment"]["torch threads"] == "1"
    assert "| structured |" in measured.as_markdown()


@pytest.mark.long
def test_memory_is_kept_for_it_and_the_result_says_so(tmp_path: Path) -> None:
    write_random_checkpoint(CONFIG, tmp_path, lambda line: None)
    kept = ObfuscateBench(model=tmp_path, threads=1, rounds=1, memory_kept=True).run(lambda line: None)
    assert "gave it back as the worker took it" in kept.as_markdown()
    assert kept.as_json()["bench"]["memory_kept"] is True
    assert kept.new_memory_seconds_per_byte > 0


@pytest.mark.long
def test_kept_memory_is_let_go_bit_by_bit_and_with_the_process() -> None:
    with KeptMemory(3 * PART_BYTES + AHEAD_BYTES) as kept:
        held = settled_bytes(kept.pid)
        assert held > 3 * PART_BYTES + AHEAD_BYTES
        kept.keep_ahead_of(2 * PART_BYTES)
        deadline = time.monotonic() + 20
        while settled_bytes(kept.pid) > held - AHEAD_BYTES - 2 * PART_BYTES and time.monotonic() < deadline:
            pass
        assert held - AHEAD_BYTES - 3 * PART_BYTES < settled_bytes(kept.pid) <= held - AHEAD_BYTES - 2 * PART_BYTES


@pytest.mark.long
def test_when_the_process_that_keeps_memory_is_killed_one_line_says_so() -> None:
    """As the kernel does where memory runs out."""
    with KeptMemory(PART_BYTES) as kept:
        os.kill(kept.pid, signal.SIGKILL)
        with pytest.raises(ConfigError, match=r"kept 0\.1 GB ended with status -9: is there so much memory\?"):
            while True:  # a line or two may still be taken by the pipe
                kept.keep_ahead_of(0)


@pytest.mark.long
def test_the_enclave_holds_two_large_matrices_beside_its_own(tmp_path: Path) -> None:
    """Of 8 that the model has, 906 MB in all. A third would be seen: it is larger than all that is allowed else.

    Their copies in the memory that is shared with the worker are counted by themselves.
    """
    config = GPT2Config(n_embd=3072, n_head=16, n_layer=2, vocab_size=64, n_positions=32)
    write_random_checkpoint(config, tmp_path, lambda line: None)
    best = ObfuscateBench(model=tmp_path, threads=2, rounds=1, first_blocks=0).run(lambda line: None).best("structured")
    large = 4 * 3072 * 12288
    other = 110_000_000  # the model's classes, imported late; tiles; what the allocator keeps
    assert best["enclave_bytes"] < other
    assert best["enclave_shared_bytes"] <= SHARED_BYTES
    assert best["enclave_peak_bytes"] - best["enclave_shared_bytes"] - best["before_bytes"] < 2 * large + other


@pytest.mark.long
def test_a_process_that_fails_is_told_from_one_that_is_slow(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="ended with status"):
        ObfuscateBench(model=tmp_path, rounds=1, threads=1).run(lambda line: None)
    assert "holds no config.json" in capfd.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_shards_make_one_model(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obfuscate, "SHARD_BYTES", 20_000)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=tied,
    )  # fmt: skip
    write_random_checkpoint(config, tmp_path, lambda line: None)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert stored.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name])


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=obfuscate.SPARE_BYTES))
    with pytest.raises(StorageError, match="bytes free"):
        write_random_checkpoint(CONFIG, tmp_path, lambda line: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_usage_is_that_of_the_process() -> None:
    before = cpu_seconds(), time.process_time()
    while time.process_time() < before[1] + 0.2:
        pass
    assert cpu_seconds() - before[0] == pytest.approx(time.process_time() - before[1], abs=0.05)
    assert 0 < settled_bytes() <= peak_bytes()
    with pytest.raises(StorageError):
        peak_bytes(2**22 + 1)
