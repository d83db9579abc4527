"""Files that lie in memory alone, and a folder through which programs read them by name. Linux.

A process that opens them by the folder's links opens /proc/<its id>/fd/N, so the folder is one process's. A child
that shall read them inherits the descriptors and makes a folder of its own:

    parent    files = bundle.load_into_memory()
              subprocess.Popen([..., json.dumps(dict(files.descriptors))], pass_fds=files.descriptors.values())
    child     with linked(json.loads(argument)) as path:
                  load(path)

`secret_memory.forbid_dumps` may be called before or after: a process reaches its own descriptors all the same.
"""

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from obfuscatune.errors import StorageError
from obfuscatune.protocol.files import temporary_root
from obfuscatune.sealing.manifest import check_names

_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - links are made there in a folder of mode 0700


class MemoryFiles:
    """Anonymous files of given sizes. To be filled, then sealed against any change, then closed."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Raises StorageError: the system has no such files, or no more of them."""
        if sys.platform != "linux":
            raise StorageError("only Linux has files in memory (memfd_create)")
        self._descriptors: dict[str, int] = {}
        try:
            for name, size in sizes.items():
                descriptor = os.memfd_create("obfuscatune", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                self._descriptors[name] = descriptor
                os.fchmod(descriptor, 0o400)  # others could else read it, were they to come by its link
                os.ftruncate(descriptor, size)
        except OSError as error:
            self.close()
            raise StorageError(
                f"no memory files: {error.strerror}; each file takes a descriptor (ulimit -n)"
            ) from error

    @property
    def descriptors(self) -> Mapping[str, int]:
        """The descriptor of each file. They are not inherited unless the caller says so (`pass_fds`)."""
        return MappingProxyType(self._descriptors)

    def seal(self) -> None:
        """From now on nobody can write to them, not even this process."""
        for descriptor in self._descriptors.values():
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)

    def close(self) -> None:
        """Close them. Their memory is free when nothing maps it any more."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> "MemoryFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def linked(descriptors: Mapping[str, int]) -> Iterator[Path]:
    """A folder of links to open files of this process, by the names they shall have; removed in the end.

    Raises:
        IntegrityError: a name leads out of the folder, or is no name.
        StorageError: there is no place for the folder.
    """
    check_names(sorted(descriptors))
    in_memory = os.access(_MEMORY_FOLDER, os.W_OK | os.X_OK)  # names are then on no disk either
    try:
        folder = Path(tempfile.mkdtemp(prefix="obfuscatune-", dir=_MEMORY_FOLDER if in_memory else temporary_root()))
    except OSError as error:
        raise StorageError(f"no folder for links to files in memory: {error.strerror}; set TMPDIR") from error
    try:
        for name, descriptor in descriptors.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
