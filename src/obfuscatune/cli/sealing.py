"""What `provider seal`, `owner seal` and their `unseal` have in common: bundles, their key files, progress."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obfuscatune.cli import output
from obfuscatune.cli.options import AsJson
from obfuscatune.errors import ConfigError, StorageError
from obfuscatune.option import Option
from obfuscatune.report.page import format_bytes

if TYPE_CHECKING:
    from obfuscatune.sealing.seal import Kind, Progress

Out = Annotated[
    str, Option("An empty or new folder for the bundle, or a URL, as s3://models/llama.", name="out", short="-o")
]
KeyOut = Annotated[
    Path | None,
    Option(
        "File for the key; must not be there yet. Keep it: it alone opens the bundle.", unset="the bundle's name.key"
    ),
]
Identity = Annotated[Path, Option("Folder with your cert.pem and key.pem, by `obfuscatune keygen`. Its key signs.")]
_Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="Folder or URL of a bundle.")]
_Key = Annotated[Path, Option("The bundle's key file.")]
_Extracted = Annotated[Path | None, Option("A new folder for the files.", unset="checks alone", name="out", short="-o")]


def seal_and_tell(
    source: Path,
    kind: "Kind",
    check: Callable[[Path], None],
    out: str,
    key_out: Path | None,
    identity: Path,
    as_json: bool,
) -> None:
    """Check the source, seal it, write the key file, say the manifest's digest."""
    from obfuscatune.channel.identity import Identity as Signer
    from obfuscatune.sealing.key_file import KeyFile
    from obfuscatune.sealing.keys import BundleKey
    from obfuscatune.sealing.seal import seal
    from obfuscatune.sealing.source import look_through

    signer = Signer.load(identity)
    key_file = key_out or Path(
        out.rstrip("/").rpartition("/")[2] + ".key" if "://" in out else out.rstrip("/") + ".key"
    )
    _refuse_key_file(key_file, out)
    check(source)
    size = sum(it.size for it in look_through(source))
    key = BundleKey.generate()
    try:
        with _progress("sealing") as progress:
            digest = seal(source, out, key=key, signer=signer.key, kind=kind, progress=progress)
        public = signer.key.public_key().public_bytes_raw().hex()
        KeyFile(key, digest, public, kind).write(key_file)
    except OSError as error:
        raise StorageError(f"cannot write {key_file}: {error.strerror or error}; nothing opens {out} now") from error
    finally:
        key.close()
    document = {"bundle": out, "manifest": digest, "key_file": str(key_file), "signer": public, "kind": kind}
    told = {"bundle": f"{out} ({kind}, {format_bytes(size)})", "manifest": digest, "key file": key_file}
    output.write_result(document, output.labelled({**told, "signed by": public}), as_json=as_json)


def unseal(
    bundle: _Bundle,
    *,
    key: _Key,
    out: _Extracted = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a bundle, and list what it holds; with --out, write its files, decrypted.

    Without --out nothing is written, and objects that are not the bundle's are refused.
    """
    from obfuscatune.sealing.key_file import KeyFile
    from obfuscatune.sealing.opening import Bundle

    kept = KeyFile.read(key)
    try:
        opened = Bundle.open(bundle, key=kept.key, manifest_digest=kept.manifest_digest, signers={kept.signer})
        with _progress("opening") as progress:
            if out is None:
                opened.check(progress)
            else:
                opened.extract(out, progress)
    finally:
        kept.key.close()
    files = dict(opened.files)
    document = {"bundle": bundle, "manifest": kept.manifest_digest, "kind": opened.kind, "files": files}
    listed = output.labelled({name: format_bytes(size) for name, size in files.items()})
    told = f"{listed}\n{opened.kind} {kept.manifest_digest}: every byte is as it was sealed"
    output.write_result(document, told, as_json=as_json)


def _refuse_key_file(path: Path, out: str) -> None:
    """Before long work: a key that could not be written, or that would lie on the storage itself."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists and is not overwritten: name another file by --key-out")
    if not path.parent.is_dir():
        raise ConfigError(f"--key-out {path}: there is no folder {path.parent}")
    local = out.removeprefix("file://")
    if "://" not in local and path.resolve().is_relative_to(Path(local).resolve()):
        raise ConfigError(f"--key-out {path} lies within the bundle, which is for untrusted storage: keep it elsewhere")


@contextmanager
def _progress(what: str) -> "Iterator[Progress]":
    """Progress in MiB."""
    done, shown = 0, 0
    with output.progress(what) as meter:

        def advance(size: int, total: int) -> None:
            nonlocal done, shown
            if not done:
                meter.expect(total >> 20)
            done += size
            meter.advance((done >> 20) - shown, "MiB")
            shown = done >> 20

        yield advance
