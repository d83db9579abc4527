"""The transcript of a device: all that crosses the bus, as messages of the wire, for the audit.

A device writes nothing down, so its driver does: the same format that a worker process records (`protocol/transcript`).
"""

from __future__ import annotations

import itertools
import secrets
import threading
import weakref
from pathlib import Path

import torch

from obfuscatune.enclave.client.requests import ProductRequest, StoredMatrix
from obfuscatune.protocol.messages import Header, MessageType
from obfuscatune.protocol.recorder import Recorder
from obfuscatune.protocol.tensors import DType, bytes_of


class BusRecorder:
    """Writes down what one device is sent and what comes back. Safe from any thread.

    Every method raises StorageError where the disk refuses: what is missing must not pass for the whole.
    """

    def __init__(self, folder: Path) -> None:
        """Begin a transcript in `folder`.

        Raises:
            StorageError: it cannot be written.
        """
        self._recorder = Recorder(folder)
        self._session = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._asked: weakref.WeakKeyDictionary[ProductRequest, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def stored(self, matrix: StoredMatrix, elements: torch.Tensor) -> None:
        """A matrix is about to be copied to the device."""
        header = matrix.store(next(self._numbers), shared=False)
        self._write(header, elements, Header(MessageType.STORED, header.request_id, matrix.matrix_id))

    def forgotten(self, matrix_id: bytes) -> None:
        """A matrix was dropped from the device."""
        header = Header(MessageType.FORGET, next(self._numbers), matrix_id)
        self._write(header, None, Header(MessageType.DONE, header.request_id, matrix_id))

    def asked(self, request: ProductRequest) -> None:
        """Rows are about to be copied to the device."""
        number = self._asked[request] = next(self._numbers)
        self._recorder.record("request", self._session, request.header(number), bytes_of(request.rows))

    def answered(self, request: ProductRequest, product: torch.Tensor) -> None:
        """Their product is here."""
        header = Header(
            MessageType.PRODUCT,
            self._asked.pop(request),
            request.matrix_id,
            DType.of(request.dtype),
            *request.shape,
            payload_bytes=product.nbytes,
        )
        self._recorder.record("reply", self._session, header, bytes_of(product))

    def close(self) -> None:
        """Write the transcript's end."""
        self._recorder.close()

    def _write(self, header: Header, elements: torch.Tensor | None, reply: Header) -> None:
        with self._lock:
            payload = memoryview(b"") if elements is None else bytes_of(elements)
            self._recorder.record("request", self._session, header, payload)
            self._recorder.record("reply", self._session, reply, memoryview(b""))
