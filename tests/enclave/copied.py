"""What an enclave and a copy of it send next, where the copy was made behind Python's back.

A program of its own, because it forks by libc: no handler of `os.register_at_fork` runs, as none runs in a virtual
machine that is resumed twice from one snapshot. Prints how many rows of the two requests are related, for few rows and
for many: 0 is right.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.client import ClientStats
from obfuscatune.enclave.keys import RootKey, SecretStream
from obfuscatune.enclave.mixing import KroneckerMixer
from obfuscatune.enclave.product import Held, OffloadedProduct
from obfuscatune.enclave.transforms.structured import StructuredTransform

WIDTH = 512


class Recorder:
    """A link that keeps what is sent, and answers with it."""

    corrects = False

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.stats = ClientStats()

    def allocate(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """Memory to send from."""
        return torch.empty(rows, cols, dtype=dtype)

    def submit(self, matrix_id: bytes, rows: Tensor, **_: object) -> Any:
        """Take a request."""
        self.sent.append(rows.clone())
        return SimpleNamespace(result=lambda: rows, dtype=rows.dtype)

    def refusing(self) -> AbstractContextManager[None]:
        """Nothing is refused here."""
        return nullcontext()


def next_requests(product: OffloadedProduct, client: Recorder, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the original and its copy send for the same rows, after requests before."""
    for _ in range(3):
        product.finish_forward(product.start_forward(x))
    with TemporaryDirectory() as folder:
        file = Path(folder, "sent")
        copy = ctypes.PyDLL(None).fork()  # with Python's lock held: the child goes on in this thread
        product.start_forward(x)
        sent = client.sent[-1]
        if not copy:
            file.write_bytes(sent.float().numpy().tobytes())
            os._exit(0)
        if os.waitpid(copy, 0)[1]:
            raise RuntimeError("the copy failed")
        return sent.float(), torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32).view_as(sent)


def related(rows: int, dtype: torch.dtype) -> int:
    """Directions that the rows of both requests share beyond the text's own, and that their difference lacks."""
    client, R = Recorder(), StructuredTransform(WIDTH, RootKey.generate().stream("transform"))
    product = OffloadedProduct(client, Held(b""), R, R, KroneckerMixer(8, SecretStream.fresh()))  # type: ignore[arg-type]
    first, second = next_requests(product, client, torch.randn(rows, WIDTH, dtype=dtype))
    spaces = [torch.linalg.qr(sent.double().T).Q for sent in (first, second)]
    shared = int((torch.linalg.svdvals(spaces[0].T @ spaces[1]) > 0.999).sum())
    apart = int(torch.linalg.matrix_rank((first - second).double(), rtol=1e-4))
    return shared - rows + first.shape[0] - apart


if __name__ == "__main__":
    torch.set_num_threads(1)
    print([related(rows, dtype) for rows in (1, 3, 60) for dtype in (torch.float32, torch.bfloat16)])
