"""Keys in memory that is locked, left out of dumps, and zeroed; and a process that dumps no core. Best effort.

`SecretBytes` keeps a secret in pages of its own. What Python makes of it on the way (the text of a key file, a slice,
a derived key inside a library) lies in the ordinary heap and is not zeroed. docs/bundles.md says what this is worth.
"""

import contextlib
import ctypes
import hmac
import mmap
import os
import resource
import sys
from typing import Any, NoReturn

_PR_SET_DUMPABLE = 4  # sys/prctl.h
_ADVICE = {"MADV_DONTDUMP": 16, "MADV_WIPEONFORK": 18}  # sys/mman.h, Linux; Python 3.11 names only the first
_LIBC = ctypes.CDLL(None, use_errno=True)


class SecretBytes:
    """A secret of fixed length, in pages of its own.

    The pages are locked in memory as far as RLIMIT_MEMLOCK goes, left out of core dumps, empty in a forked child, and
    zeroed by `close` or when the object goes. It has no `bytes()`, no pickle and no copy; `view` gives its contents.

    Example:
        >>> with SecretBytes.random(32) as key:
        ...     key
        SecretBytes(32 bytes, redacted)
    """

    __slots__ = ("_length", "_locked", "_pages", "_process")

    def __init__(self, contents: "bytes | bytearray | memoryview") -> None:
        """Copy the contents; what they were copied from remains the caller's to zero."""
        self._allocate(memoryview(contents).nbytes)
        self._pages[: self._length] = contents

    @classmethod
    def random(cls, length: int) -> "SecretBytes":
        """A fresh secret, written into its pages by the operating system's generator.

        Raises:
            OSError: the generator cannot be read.
        """
        secret = cls.zeros(length)
        with secret.writable() as view, open("/dev/urandom", "rb", buffering=0) as generator:  # noqa: PTH123 - unbuffered
            done = 0
            while done < length:
                done += generator.readinto(view[done:])
        return secret

    @classmethod
    def zeros(cls, length: int) -> "SecretBytes":
        """Room for a secret that `writable` then takes, so that it never lies anywhere else."""
        secret = cls.__new__(cls)
        secret._allocate(length)
        return secret

    def _allocate(self, length: int) -> None:
        if length < 1:
            raise ValueError("a secret has at least one byte")
        self._length, self._process = length, os.getpid()
        self._pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._locked = _lock(self._pages)
        if sys.platform == "linux":
            for advice in _ADVICE.values():
                with contextlib.suppress(OSError):  # kernels before 4.14 empty no pages in a child
                    self._pages.madvise(advice)

    @property
    def view(self) -> memoryview:
        """The secret, to read. Release it before `close`, which else can only zero the pages and not return them.

        Raises:
            ValueError: it is closed, or this is a forked child, which has none of its parent's secrets.
        """
        return self.writable().toreadonly()

    def writable(self) -> memoryview:
        """The same, to write. Raises ValueError as `view` does."""
        if self._pages.closed or self._length == 0:
            raise ValueError("this secret is closed")
        if os.getpid() != self._process:
            raise ValueError("this secret is another process's")
        return memoryview(self._pages)[: self._length]

    @property
    def is_locked(self) -> bool:
        """Whether its pages cannot be swapped out."""
        return self._locked

    def close(self) -> None:
        """Zero the pages and give them back. A second time does nothing."""
        if self._pages.closed:
            return
        self._pages[:] = bytes(len(self._pages))
        self._length = 0
        with contextlib.suppress(BufferError):  # a view is still held; what it shows is zero now
            self._pages.close()

    def __enter__(self) -> "SecretBytes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        pages = getattr(self, "_pages", None)  # there are none where the allocation failed
        if pages is not None and not pages.closed:  # by itself: when the interpreter ends, modules are gone
            pages[:] = bytes(len(pages))

    def __len__(self) -> int:
        return self._length

    def __eq__(self, other: object) -> bool:
        """In a time that does not depend on the contents."""
        if not isinstance(other, SecretBytes):
            return NotImplemented
        with self.view as mine, other.view as theirs:
            return hmac.compare_digest(mine, theirs)

    __hash__ = None  # type: ignore[assignment]  # of a secret nothing is told

    def __repr__(self) -> str:
        return f"SecretBytes({self._length} bytes, redacted)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled and not copied")

    def __copy__(self) -> NoReturn:
        self.__reduce__()

    def __deepcopy__(self, _: Any) -> NoReturn:
        self.__reduce__()


def secret_view(key: "bytes | SecretBytes") -> memoryview:
    """A key's bytes, wherever it lies."""
    return key.view if isinstance(key, SecretBytes) else memoryview(key)


def forbid_dumps() -> tuple[str, ...]:
    """No core dumps of this process, and no debugger or other process of the same user at its memory.

    It holds for this process alone: a program that it starts by exec calls this itself. Afterwards /proc/PID of this
    process belongs to root: other processes of the same user no longer reach /proc/PID/fd, this one still does.

    Returns:
        What could not be had, as sentences for a log; empty where all of it was.
    """
    missing = []
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ValueError, OSError) as error:
        missing.append(f"core dumps are not forbidden: {error}")
    if sys.platform != "linux":
        missing.append("debuggers are not forbidden: only Linux has PR_SET_DUMPABLE")
    elif _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        missing.append(f"debuggers are not forbidden: {os.strerror(ctypes.get_errno())}")
    with SecretBytes.zeros(1) as probe:
        if not probe.is_locked:
            missing.append("keys may be swapped to disk: no memory can be locked (RLIMIT_MEMLOCK)")
    return tuple(missing)


def _lock(pages: mmap.mmap) -> bool:
    start = ctypes.c_char.from_buffer(pages)  # holds a buffer of the pages until this function returns
    return bool(_LIBC.mlock(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(pages))) == 0)
