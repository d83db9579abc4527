"""What the rest of the enclave asks of whoever holds W*: store a matrix, multiply by it, forget it.

`WorkerClient` reaches a worker process over the wire, `DeviceClient` a device of this machine. Protected layers, masks
and loading know this interface alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import torch

from obfuscatune.enclave.client.requests import MatrixSource
from obfuscatune.enclave.client.retry import ClientStats
from obfuscatune.errors import WireError

if TYPE_CHECKING:
    from obfuscatune.enclave.client.adapters import AdapterRequest


class PendingProduct(Protocol):
    """A product that was asked for and may still be on its way; see `ProductRequest`."""

    @property
    def rows(self) -> torch.Tensor:
        """What was sent."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the product."""

    def result(self) -> torch.Tensor:
        """Wait for the product; it may lie where the worker can still write to it."""

    def own(self, product: torch.Tensor) -> torch.Tensor:
        """What `result` returned, where the worker cannot write to it."""


class WorkerLink(ABC):
    """A link to one worker, or to several that act as one. Safe from any thread, and in forked children.

    Nothing that comes from the other end is trusted: products are checked by those who asked for them. After `refusing`
    met one that is wrong, every method but `close` raises, for good.
    """

    corrects = False
    """Whether `corrected` has an answer."""

    @property
    @abstractmethod
    def stats(self) -> ClientStats:
        """What went over the link so far; it goes on counting."""

    @property
    @abstractmethod
    def computes_apart(self) -> bool:
        """Whether products are computed on other cores than this process's, so that both can work at the same time."""

    @abstractmethod
    def store(
        self,
        matrix_id: bytes,
        source: MatrixSource,
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
        tensor: torch.Tensor | None = None,
        widths: tuple[int, ...] = (),
    ) -> None:
        """Have W_star held under `matrix_id`; see `WorkerClient.store`. `tensor` may be overwritten afterwards."""

    @abstractmethod
    def allocate(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory on the CPU for rows that are to be sent. It is the worker's to read and to change from now on."""

    @abstractmethod
    def submit(
        self,
        matrix_id: bytes,
        rows: torch.Tensor,
        *,
        transpose: bool,
        reply_dtype: torch.dtype | None = None,
        known_finite: bool = False,
        product_unchecked: bool = False,
    ) -> PendingProduct:
        """Send rows to be multiplied, and return at once; see `WorkerClient.submit`."""

    def multiply(
        self, matrix_id: bytes, rows: torch.Tensor, *, transpose: bool, reply_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """rows @ W_star, or rows @ W_star^T.

        Args:
            matrix_id: as it was stored.
            rows: (m, p), or (m, q) when `transpose`; contiguous, on the CPU.
            transpose: multiply by the transpose.
            reply_dtype: of the product; None for that of `rows`.

        Returns:
            (m, q), or (m, p) when `transpose`; on the CPU, contiguous, the caller's own.

        Raises:
            NonFiniteError: `rows` contain NaN or infinity; nothing was sent.
            ConfigError: no such matrix was stored, or the shapes do not fit.
            ProtectionError: the link is closed.
            WorkerRefused: the worker answered with an error that asking again does not mend.
            WireError: the worker failed more often, or was gone longer, than the retry policy bears.
        """
        return self.submit(matrix_id, rows, transpose=transpose, reply_dtype=reply_dtype).result()

    @abstractmethod
    def order(self, order: AdapterRequest) -> torch.Tensor | None:
        """Ask for something else than a product of a stored matrix; see `WorkerClient.order`."""

    @abstractmethod
    def forget(self, matrix_id: bytes) -> None:
        """Have a matrix dropped. One that was never stored is fine."""

    @abstractmethod
    def broken_off(self) -> AbstractContextManager[None]:
        """Within it, what waits for the worker in other threads fails soon; afterwards the link works anew."""

    @abstractmethod
    def refusing(self) -> AbstractContextManager[None]:
        """Within it products are judged: after one that is refused, the worker is asked nothing any more."""

    def corrected(
        self, product: PendingProduct, error: WireError, renew: Callable[[torch.Tensor], None] | None
    ) -> torch.Tensor:
        """The right product in the place of one that a check refused, where there is more than one worker to ask.

        Args:
            product: as it was asked for.
            error: of the check.
            renew: is given W_star, to draw other secret vectors for its products; None where there are none.

        Raises:
            WireError: `error`, where there is not.
        """
        raise error

    @abstractmethod
    def own(self, close: Callable[[], None]) -> None:
        """Have `close` called once the link is closed."""

    @abstractmethod
    def close(self) -> None:
        """Have all that was stored forgotten, and end the link. Twice is once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
