"""Published weights that the worker has by itself: enclaves name them by their digests and need not send them.

The files are safetensors, mapped into memory. At the start every matrix in them is hashed in both orientations, since
`nn.Linear` stores Wᵀ (q, p) and GPT-2 stores W (p, q); of a stack of matrices, each one. A matrix that an enclave asks
for is made of them when it is first asked for. All sessions share it, and it is freed with the last that holds it.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from obfuscatune.errors import ConfigError
from obfuscatune.machine import cores
from obfuscatune.protocol.limits import MAX_DIM
from obfuscatune.protocol.tensors import weight_digest
from obfuscatune.worker.buffers import matrix_memory

log = logging.getLogger(__name__)
PROGRESS_SECONDS = 2.0
"""Between two lines on how much has been hashed."""
MOST_THREADS = 4
"""That hash at a time: each holds a matrix in float32, twice."""
FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
Adopt = Callable[[torch.Tensor], torch.Tensor]
"""`Computer.adopt`."""


@dataclass(frozen=True)
class _Place:
    """Where a weight lies, and whether W (p, q) is its transpose."""

    file: Any
    name: str
    index: int | None
    """Of a stack of matrices, which one."""
    transposed: bool = False

    def weight(self) -> torch.Tensor:
        """W (p, q) in the file's dtype: a view of the mapped file."""
        tensor: torch.Tensor = self.file.get_tensor(self.name)
        matrix = tensor if self.index is None else tensor[self.index]
        return matrix.T if self.transposed else matrix


class ServedWeights:
    """The matrices of published models. Safe from any thread."""

    def __init__(self, directories: Sequence[Path]) -> None:
        """Hash all that is there; a line on stderr every two seconds says how far that is.

        Raises:
            ConfigError: a directory is missing or has no safetensors, or one of its files is damaged.
        """
        self._places: dict[bytes, _Place] = {}
        self._made: weakref.WeakValueDictionary[tuple[tuple[bytes, ...], torch.dtype], torch.Tensor] = (
            weakref.WeakValueDictionary()
        )
        self._is_in: dict[tuple[bytes, torch.dtype], tuple[bytes, ...]] = {}
        self._lock = threading.Lock()
        found = [place for directory in directories for path in _files(directory) for place in _matrices(path)]
        self._hash(found)
        log.info("serving %d published matrices", len(found))

    def find(
        self, digests: tuple[bytes, ...], shape: tuple[int, int], dtype: torch.dtype, adopt: Adopt
    ) -> torch.Tensor | None:
        """The matrix (p, q) of that dtype, made of the weights with these digests side by side; None where one lacks.

        Its memory is shared, and counts for no session. So a weight is in one matrix of each dtype at a time: whoever
        asks for another matrix with it is to send that.
        """
        places = [self._places.get(digest) for digest in digests]
        if not places or None in places or dtype not in (torch.float32, torch.float64):
            return None
        with self._lock:
            made = self._made.get((digests, dtype))
            if made is None and not self._is_taken(digests, dtype):
                made = self._make(digests, [place for place in places if place is not None], shape, dtype, adopt)
            return made if made is not None and tuple(made.shape) == shape else None

    def _is_taken(self, digests: tuple[bytes, ...], dtype: torch.dtype) -> bool:
        holders = [self._is_in.get((digest, dtype), ()) for digest in digests]
        return len(set(digests)) < len(digests) or any((holder, dtype) in self._made for holder in holders)

    def _make(
        self,
        digests: tuple[bytes, ...],
        places: list[_Place],
        shape: tuple[int, int],
        dtype: torch.dtype,
        adopt: Adopt,
    ) -> torch.Tensor | None:
        weights = [place.weight() for place in places]
        if {W.shape[0] for W in weights} != {shape[0]} or sum(W.shape[1] for W in weights) != shape[1]:
            return None
        matrix = matrix_memory(*shape, dtype)
        with torch.inference_mode():
            columns = matrix.split([W.shape[1] for W in weights], dim=1)
            for W, digest, own in zip(weights, digests, columns, strict=True):
                own.copy_(W)
                if weight_digest(own) != digest:
                    log.warning("a served file has changed since this worker was started: its weights are asked for")
                    return None
        made = adopt(matrix)
        self._made[digests, dtype] = made
        self._is_in |= {(digest, dtype): digests for digest in digests}
        return made

    def _hash(self, found: list[_Place]) -> None:
        """Digests of all matrices, in both orientations, by several threads."""
        said = time.monotonic()
        with ThreadPoolExecutor(min(MOST_THREADS, cores()), "hash") as pool:
            for done, digests in enumerate(pool.map(_digests, found), start=1):
                place = found[done - 1]
                for digest, transposed in zip(digests, (False, True), strict=True):
                    self._places.setdefault(digest, _Place(place.file, place.name, place.index, transposed))
                if time.monotonic() - said > PROGRESS_SECONDS:
                    said = time.monotonic()
                    log.info("hashing the served weights: %d of %d matrices", done, len(found))


def _digests(place: _Place) -> tuple[bytes, bytes]:
    W = place.weight()
    return weight_digest(W), weight_digest(W.T)


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise ConfigError(f"--serve-model {directory}: there is no such directory")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"--serve-model {directory}: it holds no *.safetensors, the only weights that are read")
    return files


def _matrices(path: Path) -> Iterator[_Place]:
    """The matrices of a file, and those that its stacks are made of; the rest is passed over."""
    from safetensors import SafetensorError, safe_open  # a worker that serves none needs no more than torch

    try:
        file = safe_open(path, framework="pt", device="cpu")
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            if tensor.dtype not in FLOATS or tensor.dim() not in (2, 3) or 0 in tensor.shape:
                continue
            if max(tensor.shape[-2:]) > MAX_DIM:
                continue
            yield from (_Place(file, name, index) for index in (range(len(tensor)) if tensor.dim() == 3 else [None]))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"--serve-model: {path} is no whole safetensors file ({error}): fetch it anew") from error
