"""How a process sets itself up: seen from outside, in processes of their own."""

import os
import subprocess
import sys

import pytest

FREED = """
import resource
from obfuscatune.process import settle_process
if {settle}:
    settle_process()
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # until the heap has room for one more than it needs, which alignment takes
    torch.ones(20_000_000)
before = faults()
for _ in range(10):
    torch.ones(20_000_000)
print(faults() - before)
"""


def page_faults(settle: bool) -> int:
    """Of allocating 80 MB ten times over."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    script = FREED.format(settle=settle)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    assert page_faults(settle=True) < 10_000 < 100_000 < page_faults(settle=False)
