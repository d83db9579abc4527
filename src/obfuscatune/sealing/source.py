"""What is sealed: a folder or a file of the sealer's own, looked through before long work begins."""

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.errors import DataError, IntegrityError, ModelFileError, ObfuscaTuneError, StorageError
from obfuscatune.sealing.manifest import MAX_FILE_BYTES, MAX_FILES, check_names

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 64 * 2**20
_MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file, as its own library has it."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that will be sealed, as it was when the folder was looked through."""

    name: str
    path: Path
    size: int
    _state: tuple[int, int, int, int]

    def read_into(self, room: memoryview, offset: int) -> None:
        """Read a part of it.

        Raises:
            StorageError: it cannot be read, or has changed meanwhile.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                done = 0
                while done < len(room):
                    count = os.preadv(descriptor, [room[done:]], offset + done)
                    if not count:
                        break
                    done += count
                if done < len(room) or _state(os.fstat(descriptor)) != self._state:
                    raise StorageError(f"{self.path} was changed while it was sealed: seal it again")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}") from error


def look_through(source: Path) -> tuple[SourceFile, ...]:
    """All files of a folder, or the one file, in the order of their names.

    A link to a file is followed within the folder, and to `blobs` beside it, where the Hub's cache keeps the files of
    a model. Links that lead elsewhere, links to folders, pipes and devices are refused.

    Raises:
        DataError: there is nothing to seal, or something that cannot be sealed.
        StorageError: the folder cannot be read.
    """
    try:
        if source.is_dir():
            root = source.resolve(strict=True)
            within = (root, root.parent.parent / "blobs")
            found = [_file(path, path.relative_to(root).as_posix(), within) for path in _paths(root)]
        else:
            resolved = source.resolve(strict=True)
            found = [_file(resolved, source.name, (resolved.parent,))]
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or source} is not there") from None
    except OSError as error:
        raise StorageError(f"cannot read {error.filename or source}: {error.strerror or error}") from error
    if not found:
        raise DataError(f"{source} holds no file")
    found.sort(key=lambda it: it.name)
    try:
        check_names([it.name for it in found])
    except IntegrityError as error:
        raise DataError(f"{source} cannot be sealed: {error}") from None
    if len(found) > MAX_FILES or any(it.size > MAX_FILE_BYTES for it in found):
        raise DataError(f"{source} cannot be sealed: a bundle has at most {MAX_FILES:,} files of 16 TiB")
    return tuple(found)


def check_model(source: Path) -> None:
    """Check that a folder is a model in Hugging Face's layout: its configuration, and weights that are all there.

    Whether the enclave can protect it is told by `obfuscatune inspect`, which needs torch.

    Raises:
        ModelFileError: it is none.
    """
    if not source.is_dir():
        raise ModelFileError(f"{source} is no folder, so it is no model in Hugging Face's layout")
    config = _json(source / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise ModelFileError(f"{source / CONFIG} names no model_type")
    if (source / INDEX).exists():
        weight_map = _json(source / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFileError(f"{source / INDEX} has no weight_map")
        names = {str(it) for it in weight_map.values()}
    else:
        names = {"model.safetensors"}
    for name in sorted(names):
        _check_safetensors(source / name)


def check_adapter(source: Path) -> None:
    """Check that a folder is a LoRA adapter in PEFT's format. Raises ModelFileError: it is none."""
    _json(source / ADAPTER_CONFIG)
    _check_safetensors(source / "adapter_model.safetensors")


def check_records(source: Path) -> None:
    """Check that a file is JSON Lines: one object a line. Raises DataError: it is not; it names the line."""
    try:
        with source.open("rb") as file:
            number = 0
            for number, line in enumerate(iter(lambda: file.readline(_MAX_JSON_BYTES), b""), 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise DataError(f"{source}, line {number}: expected a JSON object")
        if not number:
            raise DataError(f"{source} is empty")
    except (ValueError, RecursionError):
        raise DataError(f"{source}, line {number}: no JSON; the data of `owner seal` is JSON Lines") from None
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}") from error


def _paths(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from _paths(path)
        else:
            yield path


def _file(path: Path, name: str, within: tuple[Path, ...]) -> SourceFile:
    target = path.resolve(strict=True) if path.is_symlink() else path
    found = target.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is no regular file: a bundle holds files alone")
    if target is not path and not any(target.is_relative_to(folder) for folder in within):
        raise DataError(f"{path} is a link to {target}, outside of what is sealed: put the file itself there")
    return SourceFile(name, target, found.st_size, _state(found))


def _state(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _json(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelFileError(f"{path} is too long to be what its name says")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        raise ModelFileError(f"{path} is no JSON") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{path} is no JSON object")
    return found


def _check_safetensors(path: Path) -> None:
    """Its header is there, and as many bytes after it as the header says."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ModelFileError(f"{path} is no safetensors file")
            header = json.loads(file.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        if max(ends, default=0) != size - 8 - length:
            raise ModelFileError(f"{path} is cut short, or longer than its header says")
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except ObfuscaTuneError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ModelFileError(f"{path} is no safetensors file") from None
