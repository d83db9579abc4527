"""The model that is measured, and one worker process for all cells that need one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from obfuscatune.assets import tiny_model_path
from obfuscatune.enclave.config import read_config
from obfuscatune.enclave.loading import find_directory, load
from obfuscatune.enclave.local_worker import local_worker
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.published import Base
from obfuscatune.reproduction.presets import Method
from obfuscatune.training.checkpoint import model_fingerprint
from obfuscatune.training.run import load_plain
from obfuscatune.training.tokens import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """The model in its files; `fingerprint` tells it from others."""

    directory: Path
    tokenizer: PreTrainedTokenizerBase
    config: Any
    fingerprint: str

    @classmethod
    def find(cls, model: str | None) -> Subject:
        """A directory, a hub id, or the embedded model if None.

        Raises:
            ModelFileError: there is no such model, or its configuration or tokenizer cannot be read.
        """
        directory = find_directory(model if model is not None else tiny_model_path())
        return cls(directory, read_tokenizer(directory), read_config(directory), model_fingerprint(directory))


_UNSAID: Base = "closed"
"""No word of public bases: what is measured here is precision and time, on public data."""


class Opening:
    """Opens models, protected or plain; the worker starts with the first that needs it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    @cached_property
    def worker(self) -> str:
        """Its address."""
        return self._stack.enter_context(local_worker()).address

    @cached_property
    def mask_worker(self) -> str:
        """Its address."""
        return self._stack.enter_context(local_worker()).address

    @contextmanager
    def model(self, directory: Path, method: Method, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
        """A model from its files.

        Raises:
            ModelFileError, ConfigError, WireError: as `load` does.
        """
        if method.profile is None:
            yield load_plain(directory, read_config(directory), dtype).eval()
            return
        workers = self._workers_for(method)
        model = load(directory, profile=method.profile, dtype=dtype, base=_UNSAID, **workers, **method.knobs)
        with _let_go(model):
            yield model

    @contextmanager
    def protected(self, model: PreTrainedModel, method: Method) -> Iterator[PreTrainedModel]:
        """A model that is in memory, protected in place; as it is where the method protects nothing."""
        if method.profile is None:
            yield model
            return
        workers = self._workers_for(method)
        with _let_go(protect(model, profile=method.profile, base=_UNSAID, **workers, **method.knobs)):
            yield model

    def _workers_for(self, method: Method) -> dict[str, Any]:
        """Those that the profile takes; none where nothing leaves the enclave."""
        profile = resolve(method.profile or "enclave", **method.knobs)
        workers = {"workers": self.worker} if profile.offload else {}
        return workers | ({"mask_worker": self.mask_worker} if profile.masks else {})


@contextmanager
def _let_go(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Have the worker forget the model's matrices afterwards."""
    try:
        yield model
    finally:
        model.protection.close()
