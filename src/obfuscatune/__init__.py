"""ObfuscaTune: fine-tune and run a proprietary language model on hardware that learns neither model nor text.

Names are imported when they are first used, so that a worker never loads the enclave.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from obfuscatune.version import __version__

if TYPE_CHECKING:
    from obfuscatune import errors as errors
    from obfuscatune.enclave.client import DeviceClient, RetryPolicy, WorkerClient
    from obfuscatune.enclave.keys import RootKey
    from obfuscatune.enclave.loading import load
    from obfuscatune.enclave.local_worker import local_worker
    from obfuscatune.enclave.pace import paced
    from obfuscatune.enclave.profiles import Profile
    from obfuscatune.enclave.protect import protect
    from obfuscatune.enclave.protection import Masking
    from obfuscatune.enclave.published import PublicBaseWarning
    from obfuscatune.enclave.training_hooks import RekeyCallback
    from obfuscatune.errors import ObfuscaTuneError
    from obfuscatune.fleet.fleet_file import Fleet
    from obfuscatune.process import settle_process
    from obfuscatune.protocol.tls import TlsConfig
    from obfuscatune.reproduction.run import reproduce
    from obfuscatune.training.provider_adapter import load_provider_adapter

_HOMES = {
    "DeviceClient": "enclave.client",
    "Fleet": "fleet.fleet_file",
    "Masking": "enclave.protection",
    "ObfuscaTuneError": "errors",
    "Profile": "enclave.profiles",
    "PublicBaseWarning": "enclave.published",
    "RekeyCallback": "enclave.training_hooks",
    "RetryPolicy": "enclave.client",
    "RootKey": "enclave.keys",
    "TlsConfig": "protocol.tls",
    "WorkerClient": "enclave.client",
    "load": "enclave.loading",
    "load_provider_adapter": "training.provider_adapter",
    "local_worker": "enclave.local_worker",
    "paced": "enclave.pace",
    "protect": "enclave.protect",
    "reproduce": "reproduction.run",
    "settle_process": "process",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(f"{__name__}.errors")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if line := import_module(f"{__name__}.machine").refusal():
        raise ImportError(line)
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "DeviceClient",
    "Fleet",
    "Masking",
    "ObfuscaTuneError",
    "Profile",
    "PublicBaseWarning",
    "RekeyCallback",
    "RetryPolicy",
    "RootKey",
    "TlsConfig",
    "WorkerClient",
    "__version__",
    "errors",
    "load",
    "load_provider_adapter",
    "local_worker",
    "paced",
    "protect",
    "reproduce",
    "settle_process",
]
