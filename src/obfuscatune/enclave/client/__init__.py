"""The enclave's side of the boundary: multiply by a matrix that lies on a worker, whatever the worker does.

A worker is stateless but for the matrices it holds, so every failure has one remedy: drop the connection, make it
again, send what is missing, ask again. `WorkerLink` does so a bounded number of times, then raises the last error. It
has no thread of its own: requests are sent by whoever submits, replies read by whoever waits (docs/adr/0002 says why
that cannot deadlock).

In the order in which a request passes through:

    worker_link  store, multiply, forget: for any thread, which take turns
    arena        rows and products in shared memory, where enclave and worker are on one host
    adapters     what a worker can be asked about an adapter that it holds
    order        such a request, which may have to be sent once at most
    pending      a product asked for       -> a request, and what its reply must be
    driver       all that is asked for     -> one step at a time until it is done, whatever fails on the way
    uploads      matrices                  -> held by the worker, or forgotten
    connection   a request                 -> its reply, or an error; no retries
    retry        a failure                 -> a pause, or the end of patience
    stats        everything that crossed   -> counts
"""

from obfuscatune.enclave.client.adapters import AdapterLink
from obfuscatune.enclave.client.client import WorkerLink
from obfuscatune.enclave.client.requests import MatrixSource, Pending, check_finite, check_product
from obfuscatune.enclave.client.retry import LinkStats, RetryPolicy

__all__ = [
    "AdapterLink",
    "LinkStats",
    "MatrixSource",
    "Pending",
    "RetryPolicy",
    "WorkerLink",
    "check_finite",
    "check_product",
]
