"""A model's own code is never run in the enclave, and nobody is asked on standard input whether it may."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import obfuscatune
from obfuscatune import load
from obfuscatune.enclave.config import read_config
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ConfigError, ModelFileError
from tests.contract.architectures import ARCHITECTURES

SOURCE = Path(obfuscatune.__file__).parent
CODE = """
from pathlib import Path
Path(__file__).with_name("was_run").touch()
"""
ASKS = """
import sys
from obfuscatune.cli.app import run
from obfuscatune import load, ObfuscaTuneError
try:
    load(sys.argv[1], "unix:/nowhere")
except ObfuscaTuneError as error:
    print("refused:", error)
print("inspect:", run(["inspect", "--model", sys.argv[1]]))
print("left on stdin:", len(sys.stdin.read()))
"""


@pytest.mark.parametrize("model_type", [pytest.param("vit", marks=pytest.mark.long), "unknown-to-transformers"])
def test_no_code_of_the_model_is_run_though_stdin_says_yes(tmp_path: Path, model_type: str) -> None:
    """ViT is known and has no causal head: `from_config` asked on standard input, and `y` there was consent."""
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer")
    auto_map = {name: f"code.{name}" for name in names}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": auto_map}))
    (tmp_path / "code.py").write_text(CODE)
    ARCHITECTURES["llama"].build(torch.float32).save_pretrained(tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").rename(tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", ASKS, tmp_path], input="y\n" * 20, capture_output=True, text=True, timeout=120
    )
    assert "refused:" in done.stdout, done.stderr
    assert "left on stdin: 40" in done.stdout
    assert "inspect: 0" not in done.stdout or model_type == "vit"
    assert not list(tmp_path.rglob("was_run"))


KERNELS: dict[str, dict[str, Any]] = {
    "attention": {"attn_implementation": "some-org/flash"},
    "attention, as saved": {"_attn_implementation": "some-org/flash@main:attention"},
    "attention by part": {"attn_implementation": {"": "sdpa", "text_config": "some-org/flash"}},
    "attention of a part": {"text_config": {"_attn_implementation": "some-org/flash"}},
    "experts": {"experts_implementation": "sonicmoe"},
    "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
}


@pytest.mark.parametrize("changes", KERNELS.values(), ids=KERNELS)
def test_what_would_fetch_code_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    ARCHITECTURES["llama"].build(torch.float32).config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ModelFileError, match=r"runs no code|quantised"):
        read_config(tmp_path)


def test_an_attention_that_is_not_installed_is_left_to_transformers(tmp_path: Path) -> None:
    """`flash_attention_2` in a published file is common; transformers would fetch its kernel from the hub."""
    ARCHITECTURES["llama"].build(torch.float32).config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attn_implementation": "flash_attention_2"}))
    assert read_config(tmp_path)._attn_implementation is None


def test_auto_map_is_dropped(tmp_path: Path) -> None:
    config = ARCHITECTURES["llama"].build(torch.float32).config
    config.auto_map = {"AutoModelForCausalLM": "code.Model"}
    config.save_pretrained(tmp_path)
    assert not hasattr(read_config(tmp_path), "auto_map")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"trust_remote_code": True}, "runs no code that comes with a model"),
        ({"attn_implementation": "some-org/flash"}, "fetches no kernel"),
        ({"experts_implementation": "some-org/moe"}, "fetches no kernel"),
    ],
)
def test_code_asked_for_by_keyword(tmp_path: Path, worker: LocalWorker, keywords: dict[str, Any], message: str) -> None:
    ARCHITECTURES["llama"].build(torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, worker.address, **keywords)


def test_every_call_of_transformers_says_no() -> None:
    """Each `AutoX.from_pretrained` and `.from_config` in the source passes `trust_remote_code=False`."""
    silent = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value
            if node.func.attr not in ("from_pretrained", "from_config") or not isinstance(owner, ast.Name):
                continue
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if owner.id.lower().startswith("auto") and said.get("trust_remote_code") != "False":
                silent.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert not silent
