"""`--fleet`: many workers in the place of one, in every command that takes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from obfuscatune.cli.protection import Protection
from obfuscatune.errors import ConfigError
from tests.cli.conftest import Ran
from tests.enclave.fleet.members import members


def fleet_file(folder: Path, addresses: list[str], masks: list[str] | None = None) -> Path:
    entries = [{"address": it, "operator": "a", "party": "compute"} for it in addresses]
    entries += [{"address": it, "operator": "b", "party": "mask"} for it in masks or []]
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({"members": entries}))
    return path


@pytest.mark.parametrize("profile", ["private", "guarded"])
def test_generate_on_a_fleet(tmp_path: Path, profile: str, obfuscatune: Callable[..., Ran]) -> None:
    with members(2) as them, members(2) as maskers:
        path = fleet_file(tmp_path, list(them), list(maskers))
        asked = ("generate", "--prompt", "Hello", "--max-new-tokens", "2", "--dtype", "float32", "--json")
        came = obfuscatune(*asked, "--fleet", path, "--profile", profile)
        assert came.code == 0, came.stderr
        assert all(it.products for it in them.values())
        assert all(bool(it.products) for it in maskers.values()) == (profile == "guarded")
        plain = obfuscatune(*asked, "--plain")
        assert came.document["text"] == plain.document["text"]


def test_inspect_shows_who_would_hold_what(tmp_path: Path, obfuscatune: Callable[..., Ran]) -> None:
    path = fleet_file(tmp_path, ["unix:/run/a.sock", "unix:/run/b.sock"])
    document = obfuscatune("inspect", "--fleet", path, "--json").document
    placed = document["fleet"]["compute"]
    assert sum(it["bytes"] for it in placed["workers"]) == document["worker"]["bytes_sent_once"]
    assert {name for shard in placed["shards"] for name in shard["holders"]} == {"unix:/run/a.sock", "unix:/run/b.sock"}
    assert "unix:/run/a.sock" in obfuscatune("inspect", "--fleet", path).stdout


def test_a_fleet_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fleet_file(tmp_path, ["unix:/run/a.sock"])
    with pytest.raises(ConfigError, match="leave out --mask-worker"):
        Protection(fleet=path, mask_worker="unix:/run/b.sock")
    monkeypatch.setenv("OBFUSCATUNE_WORKER", "unix:/run/b.sock")
    assert Protection(fleet=path, worker="unix:/run/b.sock").worker is None
    monkeypatch.setenv("OBFUSCATUNE_FLEET", str(path))
    assert Protection(fleet=path, worker="unix:/run/c.sock").fleet is None
