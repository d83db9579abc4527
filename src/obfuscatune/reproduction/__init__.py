"""The paper's tables, made anew: `obfuscatune reproduce`.

Data passes through the files in this order:

    presets    a name                    -> how much is measured, and how each method protects
    request    options                   -> what is asked for, checked before anything is computed; its cells
    cells      settings, a result        -> one JSON file for each measurement that is done
    opening    a model, a method         -> that model, protected or plain
    accuracy   a task, a method, a seed  -> a model tuned and asked; and asked again in 16 bits
    error      a model, a method         -> how far its logits are from the plain ones, by depth and number format
    costs      a shape, a profile        -> the enclave's share, slowdown, time to obfuscate
    compared   cells                     -> plain and protected side by side, and which claims hold
    tables     cells                     -> the paper's tables; `charts`, the same as pictures
    documents  tables and charts         -> Markdown, CSV, one HTML page
    run        the request               -> all of it, whatever is not done yet
"""
