"""`provider seal`, `owner seal` and `unseal`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from obfuscatune.assets import tiny_model_path


@pytest.fixture
def identity(obfuscatune, tmp_path) -> Path:
    assert obfuscatune("keygen", "--out", tmp_path / "keys").code == 0
    return tmp_path / "keys"


def test_a_model_is_sealed_checked_and_comes_back(obfuscatune, identity, tmp_path):
    bundle, again = tmp_path / "bundle", tmp_path / "again"
    ran = obfuscatune("provider", "seal", tiny_model_path(), "-o", f"{bundle}/", "--identity", identity, "--json")
    assert ran.code == 0, ran.stderr
    told = ran.document
    assert told["key_file"] == f"{bundle}.key"
    kept = json.loads((tmp_path / "bundle.key").read_text())
    assert kept["manifest"] == told["manifest"]
    assert kept["key"] not in ran.stdout + ran.stderr
    ran = obfuscatune("provider", "unseal", bundle, "--key", f"{bundle}.key")
    assert ran.code == 0, ran.stderr
    assert "every byte is as it was sealed" in ran.stdout
    assert obfuscatune("provider", "unseal", bundle, "--key", f"{bundle}.key", "-o", again).code == 0
    assert {it.name: it.read_bytes() for it in again.iterdir()} == {
        it.name: it.read_bytes() for it in tiny_model_path().iterdir()
    }
    chunk = next((bundle / "chunks").iterdir())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\0")
    ran = obfuscatune("provider", "unseal", bundle, "--key", f"{bundle}.key")
    assert (ran.code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: chunk ")


def test_data_and_adapters_are_told_apart(obfuscatune, identity, notes, tmp_path):
    ran = obfuscatune("owner", "seal", notes, "-o", tmp_path / "data", "--identity", identity, "--json")
    assert ran.document["kind"] == "data"
    ran = obfuscatune("owner", "unseal", tmp_path / "data", "--key", tmp_path / "data.key", "--json")
    assert ran.document["files"] == {"notes.jsonl": notes.stat().st_size}
    ran = obfuscatune("owner", "seal", tiny_model_path(), "-o", tmp_path / "no", "--identity", identity)
    assert ran.code == 1
    assert "adapter_config.json" in ran.stderr
    notes.write_text('{"prompt": "a"}\nno JSON\n')
    ran = obfuscatune("owner", "seal", notes, "-o", tmp_path / "no", "--identity", identity)
    assert "notes.jsonl, line 2: no JSON" in ran.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("wrong", ["no model", "a key there", "a key inside", "no identity", "bundle there"])
def test_what_would_fail_late_fails_first(obfuscatune, identity, tmp_path, wrong):
    model, out, more = tiny_model_path(), tmp_path / "bundle", []
    if wrong == "no model":
        model = tmp_path
    elif wrong == "a key there":
        (tmp_path / "bundle.key").write_text("in use")
    elif wrong == "a key inside":
        out.mkdir()
        more = ["--key-out", out / "key"]
    elif wrong == "no identity":
        identity = tmp_path / "nowhere"
    else:
        (out / "chunks").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    ran = obfuscatune("provider", "seal", model, "-o", out, "--identity", identity, *more)
    assert ran.code in (1, 2)
    assert ran.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("group", ["provider", "owner"])
def test_each_command_of_a_group_has_an_example(obfuscatune, group):
    for command in ("seal", "unseal"):
        assert f"Example: obfuscatune {group} {command}" in obfuscatune(group, command, "--help").stdout
