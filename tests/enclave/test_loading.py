"""Model directories that are not what they claim to be: each gives a ModelFileError that names the trouble."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from obfuscatune import load, protect
from obfuscatune.enclave.client import MatrixSource, WorkerClient
from obfuscatune.enclave.loading import find_directory
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.enclave.protection import Clients
from obfuscatune.errors import ModelFileError, ProtectionError, StorageError
from tests.contract.architectures import ARCHITECTURES

Damage = Callable[[Path], None]
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small Llama, whole."""
    ARCHITECTURES["llama"].build(torch.float32).save_pretrained(tmp_path)
    return tmp_path


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Change the tensors in the file."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def config(**changes: Any) -> Damage:
    """Change the configuration."""

    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def text(name: str, content: str) -> Damage:
    """Put something else into a file."""
    return lambda directory: (directory / name).write_text(content) and None


def index(content: Any) -> Damage:
    """Put an index in the place of the single file, which becomes a shard beside it."""

    def damage(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "shard.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def text_index(content: str) -> Damage:
    """The same, of any text."""

    def damage(directory: Path) -> None:
        index({})(directory)
        (directory / "model.safetensors.index.json").write_text(content)

    return damage


def cut(keep: Callable[[bytes], bytes]) -> Damage:
    """Cut the file."""

    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(keep(path.read_bytes()))

    return damage


def only_a_pickle(directory: Path) -> None:
    """The old format, which runs what it holds."""
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")


FAULTS: dict[str, tuple[Damage, str]] = {
    "cut in the tensors": (cut(lambda data: data[:-100]), "not a whole safetensors file"),
    "cut in the header": (cut(lambda data: data[:100]), "not a whole safetensors file"),
    "empty": (cut(lambda _: b""), "not a whole safetensors file"),
    "header of 2^60 bytes": (cut(lambda data: (2**60).to_bytes(8, "little") + data[8:]), "not a whole safetensors"),
    "int8 weight": (weights(lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})), f"{DOWN}.*holds I8"),
    "int8 norm": (weights(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), f"{NORM}.*holds I8"),
    "wrong shape": (weights(lambda t: t.update({DOWN: t[DOWN].T.contiguous()})), r"shape \(67, 48\).*\(48, 67\)"),
    "missing weight": (weights(lambda t: t.pop(DOWN)), f"{DOWN}.* is missing"),
    "missing norm": (weights(lambda t: t.pop(NORM)), f"{NORM}.* is missing"),
    "missing head": (weights(lambda t: t.pop("lm_head.weight")), "lm_head.weight.* is missing"),
    "pickle only": (only_a_pickle, "safe_serialization"),
    "no config": (lambda directory: (directory / "config.json").unlink(), "holds no config.json"),
    "config is no JSON": (text("config.json", "{"), "config.json cannot be used"),
    "config is a list": (text("config.json", "[1]"), "config.json cannot be used"),
    "config is empty": (text("config.json", "{}"), "config.json cannot be used"),
    "unknown architecture": (config(model_type="nonsense"), "config.json cannot be used"),
    "model type is a number": (config(model_type=7), "config.json cannot be used"),
    "sizes are text": (config(hidden_size="large"), "config.json cannot be used"),
    "sizes do not divide": (config(num_attention_heads=7), "config.json cannot be used"),
    "no heads": (config(num_attention_heads=0, num_key_value_heads=0), "config.json cannot be used"),
    "negative size": (config(intermediate_size=-1), "config.json cannot be used"),
    "unknown activation": (config(hidden_act="nonsense"), "config.json cannot be used"),
    "encoder asked to generate": (config(model_type="vit"), "config.json cannot be used"),
    "index climbs out": (index({"weight_map": {DOWN: "../shard.safetensors"}}), "not a file beside it"),
    "index names a root": (index({"weight_map": {DOWN: "/etc/passwd"}}), "not a file beside it"),
    "index names a number": (index({"weight_map": {DOWN: 7}}), "not a file beside it"),
    "index names nothing": (index({"weight_map": {DOWN: ""}}), "not a file beside it|not a whole safetensors"),
    "index without a map": (index({}), "not a safetensors index"),
    "index is a list": (index([]), "not a safetensors index"),
    "index nested too deeply": (text_index("[" * 10**5), "not a safetensors index"),
    "map is a list": (index({"weight_map": []}), "not a safetensors index"),
    "map of lists": (index({"weight_map": {DOWN: ["shard.safetensors"]}}), "not a safetensors index"),
    "shard is absent": (index({"weight_map": {DOWN: "other.safetensors"}}), "not a whole safetensors file"),
    "generation config": (text("generation_config.json", "{"), "generation_config.json cannot be used"),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_read(directory: Path, worker: LocalWorker, damage: Damage, message: str) -> None:
    damage(directory)
    with pytest.raises(ModelFileError, match=message):
        load(directory, worker.address)


@pytest.mark.parametrize("name", ["no/such-model", "../../nowhere", "a b c"])
def test_no_such_model(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFileError, match="neither a directory here nor a model"):
        find_directory(name)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError):
        find_directory(tmp_path / "model.safetensors")


def test_extra_tensors_do_no_harm(directory: Path, worker: LocalWorker) -> None:
    weights(lambda tensors: tensors.update({"model.layers.0.rotary_emb.inv_freq": torch.ones(4)}))(directory)
    load(directory, worker.address).protection.close()


def test_a_protected_model_is_not_saved(directory: Path, worker: LocalWorker, tmp_path: Path) -> None:
    loaded = load(directory, worker.address)
    model = protect(AutoModelForCausalLM.from_pretrained(directory), worker.address)
    for protected in (loaded, model):
        with pytest.raises(ProtectionError, match="cannot be saved"):
            protected.save_pretrained(tmp_path / "copy")
        protected.protection.close()
    assert not (tmp_path / "copy").exists()


class KeepingClient(WorkerClient):
    """Keeps what would make each matrix again, and whether it was closed."""

    def __init__(self) -> None:
        self.sources: list[MatrixSource] = []
        self.closed = False

    def store(self, matrix_id: bytes, source: MatrixSource, **_: Any) -> None:
        self.sources.append(source)

    def close(self) -> None:
        self.closed = True


def test_files_that_change_under_a_run_are_noticed(directory: Path) -> None:
    """W_star of other weights, under other secrets, would give wrong numbers and no error."""
    client = KeepingClient()
    load(directory, client)
    before = [source() for source in client.sources]
    with (directory / "model.safetensors").open("r+b") as file:  # in place: the file stays open
        header_bytes = int.from_bytes(file.read(8), "little")
        begin, _ = json.loads(file.read(header_bytes))[DOWN]["data_offsets"]
        file.seek(8 + header_bytes + begin)
        file.write(bytes(4))
    *others, last = client.sources
    with pytest.raises(ModelFileError, match=r"other weights for model.layers.1.mlp.down_proj"):
        last()
    for source, W_star in zip(others, before, strict=False):
        assert torch.equal(source(), W_star)


def test_no_place_to_spool_leaves_no_link_open(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = KeepingClient()
    monkeypatch.setattr("obfuscatune.enclave.protect.open_clients", lambda *_: Clients(client, opened=(client,)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(StorageError, match="cannot write temporary files"):
        protect(AutoModelForCausalLM.from_pretrained(directory), "unix:/nowhere")
    assert client.closed


def test_a_failed_protect_changes_nothing(directory: Path, worker: LocalWorker) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits

    def fail_at_the_third(done: int, *_: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        protect(model, worker.address, progress=fail_at_the_third)
    assert torch.equal(model(ids).logits, expected)
    protect(model, worker.address).protection.close()


def test_progress_counts_groups(directory: Path, worker: LocalWorker) -> None:
    seen: list[tuple[int, int, str]] = []
    load(directory, worker.address, progress=lambda *step: seen.append(step)).protection.close()
    assert [(done, total) for done, total, _ in seen] == [(done, 4) for done in range(1, 5)]  # the first block stays
    assert seen[0][2] == "model.layers.1.self_attn.q_proj+k_proj+v_proj"
