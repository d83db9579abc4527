"""A model that lies in memory alone is read as if it lay on disk, by its own process and by nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from obfuscatune.errors import IntegrityError, StorageError
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.memory_files import MemoryFiles, linked
from obfuscatune.sealing.opening import Bundle
from obfuscatune.sealing.seal import seal
from tests.sealing.bundles import FILES, Sealed

NOBODY = 65534


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from obfuscatune.assets import tiny_model_path

    folder, key, signer = tmp_path_factory.mktemp("tiny"), BundleKey.generate(), Ed25519PrivateKey.generate()
    digest = seal(tiny_model_path(), str(folder), key=key, signer=signer, chunk_bytes=1 << 20)
    signers = {signer.public_key().public_bytes_raw().hex()}
    return Bundle.open(str(folder), key=key, manifest_digest=digest, signers=signers)


def test_a_model_loads_from_memory_as_from_disk(tiny_bundle: Bundle) -> None:
    import torch
    from transformers import AutoTokenizer

    import obfuscatune
    from obfuscatune.assets import tiny_model_path

    with tiny_bundle.in_memory() as path:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = obfuscatune.load(path, profile="enclave")
    plain = obfuscatune.load(tiny_model_path(), profile="enclave")  # the folder is gone, the model stays
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_names_lie_in_a_private_folder_and_contents_nowhere(sealed: Sealed) -> None:
    with sealed.open().in_memory() as path:
        assert path.stat().st_mode & 0o777 == 0o700
        assert {it.relative_to(path).as_posix() for it in path.rglob("*") if not it.is_dir()} == set(FILES)
        assert (path / "empty").is_symlink()
        assert os.readlink(path / "empty").startswith(f"/proc/{os.getpid()}/fd/")


def test_nobody_can_write_to_them(sealed: Sealed) -> None:
    with sealed.open().load_into_memory() as files:
        for descriptor in files.descriptors.values():
            assert not os.get_inheritable(descriptor)
            assert os.fstat(descriptor).st_mode & 0o777 == 0o400
            for change in (lambda fd: os.pwrite(fd, b"x", 0), lambda fd: os.ftruncate(fd, 1)):
                with pytest.raises(PermissionError):
                    change(descriptor)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_no_link_is_made_outside_of_the_folder(name: str) -> None:
    with pytest.raises(IntegrityError), linked({name: 0}):
        pytest.fail("a folder was given")


def test_a_failure_half_way_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(StorageError), MemoryFiles({"a": 1, "b": -1}):
        pytest.fail("files were given")
    assert os.listdir("/proc/self/fd") == before


READER = """
import json, sys
from obfuscatune.sealing.memory_files import linked
with linked(json.loads(sys.argv[1])) as path:
    print((path / "config.json").read_text())
"""


def test_a_child_that_is_given_the_descriptors_reads_them(sealed: Sealed) -> None:
    with sealed.open().load_into_memory() as files:
        command = [sys.executable, "-c", READER, json.dumps(dict(files.descriptors))]
        passed = tuple(files.descriptors.values())
        child = subprocess.run(command, pass_fds=passed, capture_output=True, text=True, check=True)
        assert child.stdout.strip().encode() == FILES["config.json"]
        assert subprocess.run(command, capture_output=True).returncode != 0


HOLDER = """
import ctypes, json, os, subprocess, sys
from obfuscatune.sealing import opening
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.memory_files import linked
from obfuscatune.secret_memory import SecretBytes, forbid_dumps

folder, key, digest, signer, order = sys.argv[1:]
bundle = opening.Bundle.open(
    folder, key=BundleKey(SecretBytes(bytes.fromhex(key))), manifest_digest=digest, signers={signer}
)
if os.geteuid() == 0:  # root may read everything
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable, as a process is that never was root
cat = lambda path: subprocess.run(["cat", path], capture_output=True, text=True)
found = {}
if order == "before":
    found["missing"] = forbid_dumps()
with bundle.load_into_memory() as files, linked(files.descriptors) as path:
    config = path / "config.json"
    if order == "after":
        found["control"] = cat(config).stdout
        found["missing"] = forbid_dumps()
    found["own"] = config.read_text()
    other = cat(config)
    found["other"] = [other.returncode, other.stderr]
    found["core"] = subprocess.run(["sh", "-c", "ulimit -c"], capture_output=True, text=True).stdout.strip()
    reading, writing = os.pipe()
    if not os.fork():
        with linked(files.descriptors) as its_own:
            os.write(writing, (its_own / "config.json").read_bytes())
        os._exit(0)
    os.wait()
    os.close(writing)
    found["child"] = os.read(reading, 100).decode()
print(json.dumps(found))
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_without_dumps_the_process_still_reads_and_others_of_its_user_do_not(order: str, sealed: Sealed) -> None:
    for path in [sealed.folder, *sealed.folder.parents]:
        if path.stat().st_uid == os.geteuid() and str(path).startswith(f"{tempfile.gettempdir()}/"):
            path.chmod(0o755)
    arguments = [str(sealed.folder), sealed.key.secret.view.hex(), sealed.digest, *sealed.signers, order]
    command = [sys.executable, "-c", HOLDER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), FILES["config.json"].decode()
    assert found.get("control", expected) == expected
    assert (found["own"], found["child"], found["missing"], found["core"]) == (expected, expected, [], "0")
    assert found["other"][0] != 0
    assert "ermission denied" in found["other"][1]


def test_another_user_cannot_read_them(sealed: Sealed) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with sealed.open().in_memory() as path:
        links = [os.readlink(path / "config.json"), str(path / "config.json")]
        for link in links:
            done = subprocess.run(["cat", link], user=NOBODY, capture_output=True, text=True)
            assert done.returncode != 0
            assert "ermission denied" in done.stderr
        assert Path(links[0]).read_bytes() == FILES["config.json"]
