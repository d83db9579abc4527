"""Side-by-side measurements: protected and plain, in turn, in one run, each in a process of its own.

In the order in which data passes through:

    workload       a shape's name    -> a model with random weights, and the work that is timed on it
    clocked        a local worker with a clock on all that it computes     (clocked_worker: its program)
    measures       a piece of work   -> its products, where its time goes; the machine's limits
    processes      a module          -> a process that answers; what each holds in memory, and its CPU time
    bench_process  a word on stdin   -> one step, timed, as a line of JSON; a process for each side
    step           what to measure   -> all processes in turn
    step_result    their answers     -> medians, ratios, where the time went, what limits it, a picture
    compare        a result, kept ones  -> which ratios have grown

    obfuscate      what to measure   -> a model on disk, processes that load it in turn, and what came of it
    loading        a model on disk   -> seconds and memory of a load under protection, in a process of its own
    kept_memory    a size            -> a process that holds so much, and lets it go bit by bit

    wire           numbers of rows   -> how long they take over each kind of link, and a line fitted to that
                                        (ping_pong: bare sockets beside it)
    memory         a number of steps -> what enclave and worker hold after each, and whether it grows
    rotation       widths and rows   -> how long rotation and mixing take, by torch and by the kernels
    verify         a number of calls -> how often wrong products are caught, honest ones not, and what a worker can tell
                                        (verify_masks: of products under masks)
    sealing        a size            -> a bundle sealed and opened beside AES-GCM alone and the disk
                                        (sealing_process: one piece of that, in a process of its own)
    drift_worker   a product         -> the product plus a change that stays below the tolerance, aimed at a harm
    drift          a number of steps -> whether such a worker is caught, and what it does to loss and adapter
"""
