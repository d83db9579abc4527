"""The language that enclave and worker share. Imports neither.

In the order in which a message passes through:

    limits         every number, with its unit and its reason
    tensors        a matrix as bytes, without a copy
    payloads       what a message carries besides a matrix, as bytes
    messages       a header as bytes; who speaks another protocol
    framing        messages over a transport
    transport      a stream that carries bytes within a deadline; `tls`, the same encrypted
    sockets        deadlines, and how a connected socket is set up
    certificates   self-signed certificates, known by their keys
    shared_memory  rows and products that need not cross a stream on one host
    addresses      where somebody listens, as written on a command line
    endpoints      the enclave's end of a connection to an address; `listen`, the worker's
    files          secrets and temporary folders
    recorder       writes down what an untrusted party sees
    transcript     what was recorded, read back

`sockets`, `certificates`, `addresses` and `files` take no torch: the attested channel uses them too.

The format is written down in docs/spec/wire.md.
"""
