"""Side-by-side measurements: protected and plain, in turn, in one run, each in a process of its own.

In the order in which data passes through:

    shapes     a name            -> a model's configuration
    workload   a configuration   -> a model, and one LoRA step of it
    clocked    a local worker with a clock on all that it computes     (clocked_worker: its program, clock: shared)
    spans      a piece of work   -> where its time goes
    products   a piece of work   -> the matrix products in it
    limits     this machine      -> how fast a product can be, and how fast memory
    contender  a word on stdin   -> one step, timed, as a line of JSON; a process for each side
    contender_process   a word   -> such a process's answer
    step       what to measure   -> all contenders in turn
    step_result   their answers  -> medians, ratios, where the time went, what limits it
    plots      a result          -> a picture
    compare    a result, kept ones   -> which ratios have grown

    checkpoint   a configuration   -> a model on disk, random weights
    loading      a model on disk   -> seconds and memory of a load under protection, in a process of its own
    obfuscate    what to measure   -> such processes in turn, and what came of it

    verify       a number of calls -> how often wrong products are caught, and honest ones not
"""
