"""A model's files in memory -> tokenizer, configuration, protected model. For the service and its trainer."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from obfuscatune.enclave.client import WorkerLink, open_link
from obfuscatune.enclave.config import read_config
from obfuscatune.enclave.keys import RootKey
from obfuscatune.enclave.loading import load
from obfuscatune.enclave.protection import Masking
from obfuscatune.errors import ModelFileError
from obfuscatune.service.settings import Settings, Worker


def open_tokenizer(directory: Path) -> tuple[Any, Any]:
    """The tokenizer and the configuration of a model.

    Raises:
        ModelFileError: they cannot be read.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = read_config(directory)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False), config
    except Exception as error:  # transformers and tokenizers raise what they like, Exception itself too
        raise ModelFileError("the model has no tokenizer that can be used") from error


@contextmanager
def open_protected(directory: Path, settings: Settings, key: RootKey, model_name: str) -> Iterator[Any]:
    """The model, its large matrices on the workers that the settings name; when the `with` ends, they forget it.

    Raises:
        ModelFileError: it cannot be read as a model in safetensors.
        ConfigError, ProtectionError, WireError: as `enclave.loading.load`.
    """
    with ExitStack() as stack:
        worker = _link(stack, settings, settings.worker)
        mask_worker = None if settings.mask_worker is None else _link(stack, settings, settings.mask_worker)
        masking = Masking(None if settings.mask_worker is None else settings.tls_of(settings.mask_worker))
        model = load(
            directory,
            workers=worker,
            mask_worker=mask_worker,
            masking=masking,
            profile=settings.profile,
            dtype=getattr(torch, settings.dtype),
            key=key,
            base=None if settings.profile == "guarded" else "closed",
        )
        stack.callback(model.close)
        model.name_or_path = model_name  # adapters name their base so, not the folder that is here alone
        yield model


def _link(stack: ExitStack, settings: Settings, worker: Worker) -> WorkerLink:
    link = open_link(worker.address, tls=settings.tls_of(worker))
    stack.callback(link.close)
    return link
