"""Kernels as LLVM IR, compiled in each process and run on torch's own threads. Enclave and worker each have some.

    emit     writing LLVM IR a little above the instruction
    engine   IR -> code in memory, for the processor that it runs on
    team     a kernel on torch's own OpenMP threads

docs/adr/0010 says why they are written this way.
"""
