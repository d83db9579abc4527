"""LoRA fine-tuning of an ordinary Hugging Face model, protected or plain.

Data passes through the files in this order:

    jsonl       a file                -> numbered JSON objects
    records     a JSON object         -> a record: text, prompt and completion, or messages
    tokens      a record              -> token ids, and which of them are trained on
    data        a whole file          -> examples no longer than the model's window
    batches     examples              -> padded tensors, in an order fixed by the seed
    recipe      a run file, options   -> everything that determines a run
    adapter     a model               -> the same model with LoRA factors; and their files
    schedule    a step                -> its learning rate
    loop        batches, a model      -> trained factors, one event a step
    checkpoint  a step's state        -> a directory that is whole or absent
    run         recipe and model      -> a run directory: checkpoints, metrics, adapter

Nothing here knows whether the model is protected.
"""
