"""A model's files in memory -> tokenizer, configuration, protected model. For the service and its trainer."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from obfuscatune.enclave.client import WorkerLink, open_link
from obfuscatune.enclave.config import read_config
from obfuscatune.enclave.fleet import open_fleet
from obfuscatune.enclave.keys import RootKey
from obfuscatune.enclave.loading import load
from obfuscatune.enclave.placement import enclave_device
from obfuscatune.enclave.protection import Masking
from obfuscatune.errors import ModelFileError
from obfuscatune.fleet.fleet_file import Fleet
from obfuscatune.fleet.members import Party
from obfuscatune.service.settings import Settings

log = logging.getLogger(__name__)
Notice = Callable[[str], None]


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
def open_protected(
    directory: Path, settings: Settings, key: RootKey, model_name: str, notice: Notice = log.warning
) -> Iterator[Any]:
    """The model, its large matrices on the workers that the settings name; when the `with` ends, they forget it.

    Args:
        notice: is told, in one line, what befalls workers of a fleet.

    Raises:
        ModelFileError: it cannot be read as a model in safetensors.
        ConfigError, ProtectionError, WireError: as `enclave.loading.load`.
    """
    with open_links(settings, notice) as links:
        mask_worker = settings.mask_worker
        model = load(
            directory,
            workers=links["compute"],
            mask_worker=links.get("mask"),
            masking=Masking(None if mask_worker is None else settings.tls_of(mask_worker)),
            profile=settings.profile,
            dtype=getattr(torch, settings.dtype),
            key=key,
            device=own_device(settings),
            base=None if settings.profile == "guarded" else "closed",
        )
        try:
            model.name_or_path = model_name  # adapters name their base so, not the folder that is here alone
            yield model
        finally:
            model.close()


@contextmanager
def open_links(settings: Settings, notice: Notice = log.warning) -> Iterator[dict[Party, WorkerLink]]:
    """Links to the workers that the settings name, by party.

    Raises:
        ConfigError: they cannot be used.
        WireError: a worker, or every worker of a fleet, cannot be reached.
    """
    with ExitStack() as stack:
        links: dict[Party, WorkerLink] = {}
        for party, worker in settings.parties.items():
            tls = settings.tls_of(worker)
            if isinstance(worker, Fleet):
                links[party] = open_fleet(worker, tls=tls, notice=notice)
            else:
                links[party] = open_link(worker.address, tls=tls)
            stack.callback(links[party].close)
        yield links


def own_device(settings: Settings) -> torch.device | None:
    """Where the enclave's own part lies; None for the CPU.

    Raises:
        ConfigError: this machine has no such device, or one of the workers is that device.
    """
    workers = (it if isinstance(it, Fleet) else it.address for it in settings.parties.values())
    return enclave_device(settings.enclave_device, *workers)
