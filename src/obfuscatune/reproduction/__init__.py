"""The paper's tables, made anew: `obfuscatune reproduce`.

Data passes through the files in this order:

    presets    a name                  -> how much is measured: records, epochs, questions, shapes
    methods    a name                  -> how the model is protected: plain, paper, private, gaussian, conditioned(8)
    request    options                 -> what is asked for, checked before anything is computed
    questions  a folder or a hub id    -> a folder with the tasks' files
    cells      settings, a result      -> one JSON file for each measurement that is done
    opening    a model, a method       -> that model, protected or plain
    accuracy   a task, a method, a seed -> a model tuned and asked; and asked again in 16 bits
    error      a model, a method       -> how far its logits are from the plain ones, by depth and number format
    share      a shape                 -> which part of its parameters stays in the enclave
    slowdown   a shape, a profile      -> a protected step over a plain one
    obfuscation  a shape, a profile    -> the time from its files to under protection
    plan       the request             -> every cell that it takes
    tables     cells                   -> the paper's tables
    charts     cells                   -> the same as pictures
    documents  tables and charts       -> Markdown, CSV, one HTML page
    run        the request             -> all of it, whatever is not done yet
"""
