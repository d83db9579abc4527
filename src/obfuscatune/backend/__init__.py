"""What multiplies: the same in a worker process, and in an enclave that drives a device of its machine itself.

Nothing here knows a secret: in the enclave it hands a device what it is given, and nothing that comes back is trusted.
In the order in which a product passes through:

    devices      a name           -> a device of this machine, or what is wrong with it
    host_memory  rows, products   -> memory that a device copies from and to by itself
    computer     rows, a matrix   -> a product, at once or while others are under way
    streams      on a CUDA device -> rows up, products, results down, each on a stream of its own
    underway     a product that was asked for: waited for, within a time
"""

from obfuscatune.backend.computer import Computer
from obfuscatune.backend.devices import find_device
from obfuscatune.backend.host_memory import HostMemory
from obfuscatune.backend.underway import Underway

__all__ = ["Computer", "HostMemory", "Underway", "find_device"]
