"""What a run's times depend on: versions, processor, threads. No host name, and nothing of the user's."""

import platform
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("torch", "transformers", "peft")


def environment(threads: int | None = None) -> dict[str, str]:
    """Names and values, in the order in which they are shown.

    Args:
        threads: torch's, where other processes computed; those of this one if None.
    """
    import torch

    from obfuscatune.machine import cores
    from obfuscatune.version import __version__

    return {
        "obfuscatune": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "processor": _processor(),
        "cores": str(cores()),
        "torch threads": str(threads or torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    """The kernel's name for it, which `platform.processor()` does not give on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
