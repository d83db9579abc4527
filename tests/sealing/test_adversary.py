"""Whoever owns the storage: he may change, cut, reorder, leave out, bring back or add whatever he likes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from obfuscatune.errors import IntegrityError, StorageError
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.opening import Bundle
from obfuscatune.sealing.seal import seal
from obfuscatune.sealing.storage import LocalStorage
from obfuscatune.secret_memory import SecretBytes
from tests.sealing.bundles import CHUNK_BYTES, FILES, Sealed


def other_bundle(sealed: Sealed) -> Path:
    """Another version of the same folder, by the same sealer, under the same key."""
    folder = sealed.folder.with_name("other")
    seal(sealed.source, str(folder), key=sealed.key, signer=sealed.signer, chunk_bytes=CHUNK_BYTES)
    return folder


def cut_chunk(it: Sealed) -> None:
    it.chunks()[0].write_bytes(it.chunks()[0].read_bytes()[:-1])


def lengthen_chunk(it: Sealed) -> None:
    it.chunks()[0].write_bytes(it.chunks()[0].read_bytes() + b"\0")


def empty_chunk(it: Sealed) -> None:
    it.chunks()[0].write_bytes(b"")


def leave_out_chunk(it: Sealed) -> None:
    it.chunks()[0].unlink()


def swap_chunks(it: Sealed) -> None:
    first, second = [path for path in it.chunks() if path.stat().st_size == CHUNK_BYTES + 16][:2]
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)


def chunk_of_other_bundle(it: Sealed) -> None:
    theirs = next(path for path in (other_bundle(it) / "chunks").iterdir() if path.stat().st_size == CHUNK_BYTES + 16)
    next(path for path in it.chunks() if path.stat().st_size == CHUNK_BYTES + 16).write_bytes(theirs.read_bytes())


def all_of_other_bundle(it: Sealed) -> None:
    other = other_bundle(it)
    shutil.rmtree(it.folder)
    other.rename(it.folder)


def manifest_of_other_bundle(it: Sealed) -> None:
    shutil.copy(other_bundle(it) / "manifest", it.folder / "manifest")


def leave_out_manifest(it: Sealed) -> None:
    (it.folder / "manifest").unlink()


def cut_manifest(it: Sealed) -> None:
    (it.folder / "manifest").write_bytes((it.folder / "manifest").read_bytes()[:-1])


def lengthen_manifest(it: Sealed) -> None:
    with (it.folder / "manifest").open("ab") as file:
        file.write(b"\0")


def link_to_manifest(it: Sealed) -> None:
    (it.folder / "manifest").rename(it.folder.with_name("moved"))
    (it.folder / "manifest").symlink_to(it.folder.with_name("moved"))


def link_to_chunk(it: Sealed) -> None:
    it.chunks()[0].rename(it.folder.with_name("moved"))
    (it.folder / "chunks" / it.folder.with_name("moved").name).unlink(missing_ok=True)
    name = next(n for n in _names(it) if not (it.folder / "chunks" / n).exists())
    (it.folder / "chunks" / name).symlink_to(it.folder.with_name("moved"))


def link_to_device(it: Sealed) -> None:
    (it.folder / "manifest").unlink()
    (it.folder / "manifest").symlink_to("/dev/zero")


def pipe_for_chunk(it: Sealed) -> None:
    path = it.chunks()[0]
    path.unlink()
    os.mkfifo(path)


def pipe_for_manifest(it: Sealed) -> None:
    (it.folder / "manifest").unlink()
    os.mkfifo(it.folder / "manifest")


def folder_for_chunk(it: Sealed) -> None:
    path = it.chunks()[0]
    path.unlink()
    path.mkdir()


def huge_manifest(it: Sealed) -> None:
    with (it.folder / "manifest").open("r+b") as file:
        file.truncate(2**40)  # sparse


def _names(it: Sealed) -> list[str]:
    before = it.folder.with_name("bundle-before")
    return [path.name for path in (before / "chunks").iterdir()]


TAMPERINGS: list[Callable[[Sealed], None]] = [
    *(cut_chunk, lengthen_chunk, empty_chunk, leave_out_chunk, swap_chunks, chunk_of_other_bundle),
    *(all_of_other_bundle, manifest_of_other_bundle, leave_out_manifest, cut_manifest, lengthen_manifest),
    *(link_to_manifest, link_to_chunk, link_to_device, pipe_for_chunk, pipe_for_manifest, folder_for_chunk),
    huge_manifest,
]


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda it: it.__name__)
@pytest.mark.timeout(20)
def test_tampering_is_refused(tamper: Callable[[Sealed], None], sealed: Sealed) -> None:
    assert sealed.read_all() == FILES
    shutil.copytree(sealed.folder, sealed.folder.with_name("bundle-before"))
    tamper(sealed)
    with pytest.raises(IntegrityError):
        sealed.read_all()
    with pytest.raises(IntegrityError):
        sealed.open().check()


@pytest.mark.parametrize("tamper", [pipe_for_chunk, pipe_for_manifest, folder_for_chunk, link_to_device])
@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_even_read(tamper: Callable[[Sealed], None], sealed: Sealed) -> None:
    tamper(sealed)
    with pytest.raises(IntegrityError, match="is no regular file"):
        sealed.open().check()


def test_every_single_byte_counts(sealed: Sealed) -> None:
    opened = sealed.open()
    for path, read in (sealed.folder / "manifest", sealed.open), *((it, opened.check) for it in sealed.chunks()):
        held = path.read_bytes()
        for position in range(len(held)):
            changed = bytearray(held)
            changed[position] ^= 1 << position % 8
            path.write_bytes(changed)
            with pytest.raises(IntegrityError):
                read()
        path.write_bytes(held)
        read()


def test_an_object_beside_is_never_read_and_a_check_refuses_it(sealed: Sealed) -> None:
    (sealed.folder / "chunks" / ("0" * 64)).write_bytes(b"x")
    assert sealed.read_all() == FILES
    with pytest.raises(IntegrityError, match="1 objects are not the bundle's"):
        sealed.open().check()


def test_another_key_signer_or_digest_opens_nothing(sealed: Sealed) -> None:
    right = {"key": sealed.key, "manifest_digest": sealed.digest, "signers": sealed.signers}
    wrong = {
        "the key is not the one": {"key": BundleKey(SecretBytes(bytes(32)))},
        "not the one that was named by its digest": {"manifest_digest": "0" * 64},
        "none of the keys that are trusted": {"signers": {"0" * 64}},
        "none of the keys": {"signers": set()},
    }
    for said, change in wrong.items():
        with pytest.raises(IntegrityError, match=said):
            Bundle.open(str(sealed.folder), **{**right, **change})  # type: ignore[arg-type]


def test_nothing_of_a_changed_bundle_is_handed_out(sealed: Sealed, tmp_path: Path) -> None:
    chunk = sealed.chunks()[-1]
    chunk.write_bytes(bytes(chunk.stat().st_size))
    before = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    with pytest.raises(IntegrityError), sealed.open().in_memory():
        pytest.fail("a folder was given")
    assert (set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))) == before


def test_an_interrupted_sealing_leaves_nothing(sealed: Sealed, tmp_path: Path) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seal(sealed.source, str(tmp_path / "new"), key=sealed.key, signer=sealed.signer, progress=interrupt)
    assert list((tmp_path / "new").iterdir()) == []


KILLED = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.seal import seal
from obfuscatune.sealing.storage import LocalStorage

def wait(done, total):
    print(flush=True)
    sys.stdin.read()

seal(Path(sys.argv[1]), sys.argv[2], key=BundleKey.generate(), signer=Ed25519PrivateKey.generate(),
     chunk_bytes=16, progress=wait)
"""


def test_a_killed_sealing_leaves_no_bundle(sealed: Sealed, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(sealed.source), str(tmp_path / "new")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "new" / "manifest").exists()
    assert any((tmp_path / "new" / "chunks").iterdir())
    with pytest.raises(IntegrityError, match="manifest is missing"):
        Bundle.open(str(tmp_path / "new"), key=sealed.key, manifest_digest=sealed.digest, signers=sealed.signers)
    with pytest.raises(StorageError, match="not empty"):
        seal(sealed.source, str(tmp_path / "new"), key=sealed.key, signer=sealed.signer)


def test_of_those_who_seal_into_one_folder_at_once_one_succeeds(sealed: Sealed, tmp_path: Path) -> None:
    start, digests, refused = threading.Barrier(4), [], []

    def run() -> None:
        start.wait(30)
        try:
            digests.append(seal(sealed.source, str(tmp_path / "new"), key=sealed.key, signer=sealed.signer))
        except StorageError as error:
            refused.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(digests), len(refused)) == (1, 3)
    Bundle.open(str(tmp_path / "new"), key=sealed.key, manifest_digest=digests[0], signers=sealed.signers).check()


def test_the_place_is_taken_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))  # each looks before the other has begun
    LocalStorage(tmp_path / "new").create()
    with pytest.raises(StorageError):
        LocalStorage(tmp_path / "new").create()


def test_a_full_disk_is_a_storage_error(sealed: Sealed) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (sealed.folder / "chunks" / "full").symlink_to("/dev/full")
    with pytest.raises(StorageError):  # neither written through the link nor called a success
        LocalStorage(sealed.folder).write_chunk("full", memoryview(b"x"))
