"""From a name to a device of this machine."""

import torch

from obfuscatune.errors import ConfigError


def find_device(name: str, said: str) -> torch.device:
    """The device of that name, which is there.

    Args:
        name: cpu, cuda or cuda:N.
        said: where it was named, for errors: `--device cuda:1`.

    Raises:
        ConfigError: it is no such name, or this machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{said}: write cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{said}: write cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{said}: this machine has no CUDA device that this torch can use; take cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{said}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else torch.device("cpu")
