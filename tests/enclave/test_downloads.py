"""What is fetched of a hub repository: all that loading needs, and no second copy of the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from obfuscatune.enclave.keywords import HubOptions
from obfuscatune.enclave.loading import find_directory

NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "shard-b.safetensors",
}
NOT_NEEDED = {
    "original/model-00001.safetensors",
    "original/params.json",
    "onnx/config.json",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "model.fp16-00001-of-00002.safetensors",
    "pytorch_model.bin",
    "unwanted/adapter_model.safetensors",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository on a hub that copies what it is asked for to a folder."""

    def snapshot_download(repo_id: str, *, allow_patterns: Any, ignore_patterns: Any = None, **_: Any) -> str:
        names = NEEDED | NOT_NEEDED | {f"small/{name}" for name in NEEDED}
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "shard-b.safetensors"}})
            (tmp_path / name).write_text(index if name.endswith("index.json") else name)
        return str(tmp_path)

    monkeypatch.setattr("obfuscatune.enclave.loading.snapshot_download", snapshot_download)
    yield tmp_path


def fetched(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_templates_are_fetched_and_second_copies_are_not(hub: Path) -> None:
    assert find_directory("org/model") == hub
    assert fetched(hub) == NEEDED


def test_a_subfolder_is_fetched_by_itself(hub: Path) -> None:
    assert find_directory("org/model", hub=HubOptions(subfolder="small")) == hub / "small"
    assert fetched(hub / "small") == NEEDED
    assert fetched(hub) == {f"small/{name}" for name in NEEDED}
