"""Where the enclave's own part of a model lies: on the CPU, or on a GPU that belongs to the enclave.

Parameters that stay in the enclave, activations, rotation and mixing are on that device then; secrets are still drawn
on the CPU and copied, requests still leave from the CPU's memory, and there masks are added and products verified.

A GPU that belongs to the enclave is a confidential one, which attested itself to it (`attest/nvidia.py`): any other
shows its owner the plain text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from obfuscatune.backend import find_device
from obfuscatune.enclave.client import DeviceClient, WorkerLink
from obfuscatune.errors import ConfigError
from obfuscatune.fleet.fleet_file import Fleet
from obfuscatune.protocol.addresses import DeviceAddress


def device_of(worker: str | WorkerLink | Fleet | None) -> DeviceAddress | None:
    """The device that a worker is; None where it is another process, a fleet, or none.

    Raises:
        ConfigError: the address of a device that cannot be read.
    """
    if isinstance(worker, DeviceClient):
        return worker.address
    is_address = isinstance(worker, str) and worker.startswith(DeviceAddress.PREFIX)
    return DeviceAddress.parse(worker) if isinstance(worker, str) and is_address else None


def devices_of(workers: str | WorkerLink | Fleet | Sequence[str] | None) -> list[DeviceAddress]:
    """The devices among one worker or several."""
    if isinstance(workers, Fleet):
        found = [device_of(member.address) for member in workers.members]
    elif workers is None or isinstance(workers, str | WorkerLink):
        found = [device_of(workers)]
    else:
        found = [device_of(worker) for worker in workers]
    return [it for it in found if it is not None]


def enclave_device(
    name: str | torch.device | None, *workers: str | WorkerLink | Fleet | Sequence[str] | None
) -> torch.device | None:
    """The enclave's own device of that name; None for None, which leaves a model where it is.

    Raises:
        ConfigError: this machine has no such device, or one of the workers is that device: it would see the plain text
            that the enclave keeps from it.
    """
    if name is None:
        return None
    device = find_device(str(name), f"enclave device {name}")
    for other in (it for one in workers for it in devices_of(one)):
        if device.type == "cuda" and other.device == str(device):
            raise ConfigError(
                f"{device} cannot be both the enclave's own device and a worker: a worker is not trusted, and there it "
                "would have the plain text; name another device for one of them"
            )
    return device
