"""The enclave's side of the boundary: multiply by a matrix that lies on a worker, whatever the worker does.

A worker is stateless but for the matrices it holds, so every failure has one remedy: drop the connection, make it
again, send what is missing, ask again. `WorkerClient` does so a bounded number of times, then raises the last error. It
has no thread of its own: requests are sent by whoever submits, replies read by whoever waits (docs/adr/0002 says why
that cannot deadlock).

In the order in which a request passes through:

    opening     an address            -> a link
    interface   what every link can be asked
    client      store, multiply, forget: for any thread, which take turns
    allocator   rows and products in shared memory, where enclave and worker are on one host
    adapters    what a worker can be asked about an adapter that it holds
    requests    a product asked for, or a step of an adapter, and what its reply must be
    scheduler   all that is asked for -> one step at a time until it is done, whatever fails on the way
    connection  a request             -> its reply, or an error; no retries. Matrices are uploaded or forgotten
    device      a device of this machine, without a process; `recording`, what crosses the bus
    retry       a failure             -> a pause, or the end of patience; counts of everything that crossed
"""

from obfuscatune.enclave.client.adapters import AdapterClient
from obfuscatune.enclave.client.client import WorkerClient
from obfuscatune.enclave.client.device import DeviceClient
from obfuscatune.enclave.client.interface import PendingProduct, WorkerLink
from obfuscatune.enclave.client.opening import open_link
from obfuscatune.enclave.client.requests import MatrixSource, ProductRequest, check_finite, check_product
from obfuscatune.enclave.client.retry import ClientStats, RetryPolicy

__all__ = [
    "AdapterClient",
    "ClientStats",
    "DeviceClient",
    "MatrixSource",
    "PendingProduct",
    "ProductRequest",
    "RetryPolicy",
    "WorkerClient",
    "WorkerLink",
    "check_finite",
    "check_product",
    "open_link",
]
