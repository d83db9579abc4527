"""LoRA fine-tuning of an ordinary Hugging Face model, protected or plain.

Data passes through the files in this order:

    data_files  a JSONL file          -> numbered objects; what a record is: text, a completion, a conversation
    tables      CSV, Parquet          -> numbered objects of the same kind
    tasks       a JSON object         -> a question of a public set: prompt, choices, which of them are right
    layouts     a JSON object         -> a record, of the layout that the file's first one has
    tokens      a record              -> token ids, and which of them are trained on
    data        a whole file          -> examples no longer than the model's window
    preview     a whole file          -> what the model will see, and what of it is trained on
    recipe      a run file, options   -> everything that determines a run, under Hugging Face's names too
    adapter     a model               -> the same model with LoRA factors; their files; their optimizer
    loop        examples, a model     -> batches in the seed's order, trained factors, one event a step
    journal     events                -> metrics.jsonl, TensorBoard where asked for, and whoever watches
    storage     bytes                 -> files and directories that are whole or absent
    checkpoint  a step's state        -> one of these directories, and back; what must be the same to resume
    run         recipe and model      -> a run directory: checkpoints, metrics, adapter

Nothing here knows whether the model is protected.
"""
