"""Memory of this machine's from which a device copies rows, and to which it copies products, by itself.

Pages of their own, from the system, which nothing else of this process ever lies in: the device can read and write them
at any moment while they are registered. torch's own pinned memory would not do, for it hands out blocks in which other
data lay before, such as the batches of a data loader.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

from obfuscatune.errors import ConfigError


class HostMemory:
    """`size` bytes, registered with a CUDA device's driver until `close`; the memory itself lives as its tensors do."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Map it. Untouched pages take no memory, unless they are registered.

        Raises:
            ConfigError: the driver does not register so much.
        """
        self.size = size
        self._device = device
        self.buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # forked children share none
        self._registered: int | None = None
        if device.type != "cuda":
            return
        if hasattr(mmap, "MADV_DONTFORK"):
            self.buffer.madvise(mmap.MADV_DONTFORK)  # else a fork could leave the device copies of the wrong pages
        address = torch.frombuffer(self.buffer, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(device):
            status = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if status:
            raise ConfigError(
                f"{device}: its driver registers no {size >> 20} MiB of this machine's memory (CUDA error {status}): "
                "free some, or raise the limit of locked memory (ulimit -l)"
            )
        self._registered = address

    def close(self) -> None:
        """The device copies nothing any more. Not while it may still do so; twice is once."""
        address, self._registered = self._registered, None
        if address is None:
            return
        with suppress(RuntimeError), torch.cuda.device(self._device):  # one that failed has nothing registered
            torch.cuda.cudart().cudaHostUnregister(address)

    def begin_in_child(self) -> None:
        """In a forked child, where no driver knows of it."""
        self._registered = None
