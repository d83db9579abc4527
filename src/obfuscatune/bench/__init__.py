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
    compare    a result, kept ones   -> which ratios have grown

    checkpoint   a configuration   -> a model on disk, random weights
    loading      a model on disk   -> seconds and memory of a load under protection, in a process of its own
    kept_memory  a size            -> a process that holds so much, and lets it go bit by bit
    obfuscate    what to measure   -> such processes in turn, and what came of it

    work         a shape           -> how many operations and bytes a step of it is, plain and protected
    predict      these, and speeds -> seconds of both, and the ratio

    wire         numbers of rows   -> how long they take over each kind of link, and a line fitted to that
    memory       a number of steps -> what enclave and worker hold after each, and whether it grows
    rotation     widths and rows   -> how long rotation and mixing take, by torch and by the kernels
    verify       a number of calls -> how often wrong products are caught, and honest ones not
    lot          requests          -> whether a worker can tell which are checked
"""
