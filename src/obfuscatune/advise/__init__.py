"""What a model would cost under protection on this machine and with these workers, before anything is sent.

In the order in which data passes through:

    work      a model's shape, a profile, a batch  -> products, other operations and requests, counted
    enclave   this machine                         -> seconds of a product of any shape, of other operations
    link      a worker's address                   -> latency, bandwidth each way, seconds of its product, the
                                                      enclave's own part of a request
    cost      work and speeds                      -> seconds plain and protected, part by part, with N workers
    advice    all of it                            -> tables, and what follows from them

A worker's answers are verified as ever. How long it takes is on the enclave's clock: it may be slow on purpose, and
then looks slow.
"""
