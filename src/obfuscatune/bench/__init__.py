"""Side-by-side measurements: protected and plain, in turn, in one run, each in a process of its own.

In the order in which data passes through:

    shapes     a name            -> a model's configuration
    workload   a configuration   -> a model, and one LoRA step of it
    contender  a word on stdin   -> one step, timed, as a line of JSON; a process for each side
    step       what to measure   -> both contenders in turn, and what came of it

    checkpoint   a configuration   -> a model on disk, random weights
    loading      a model on disk   -> seconds and memory of a load under protection, in a process of its own
    obfuscate    what to measure   -> such processes in turn, and what came of it

    verify       a number of calls -> how often wrong products are caught, and honest ones not
"""
