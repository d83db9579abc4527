"""UNTRUSTED. Holds matrices it knows nothing about and multiplies by them. Imports what is shared alone.

In the order in which a request passes through:

    server          accepts connections; from options to a running worker
    connection      who is there; one thread reads requests and sends replies
    request_reader  the next request, within the limits that were announced; `buffers`, its memory
    handlers        decides what is done; `adapter_handlers`, the same for LoRA on the worker
    store           holds matrices in memory and on disk
    replies         a result or a refusal

Products are computed by `obfuscatune.backend`, which an enclave's own devices have too; `adapters` and `lora` compute
what goes beside a product. `protocol/recorder` writes down all that passed, where it is asked to. `sessions` keeps
those who are connected apart and whose turn it is, and `quota` divides what they share. `__main__` and `options` start
a worker.
"""
