"""LoRA fine-tuning of an ordinary Hugging Face model, protected or plain.

Data passes through the files in this order:

    jsonl       a file                -> numbered JSON objects
    tables      CSV, Parquet          -> numbered objects of the same kind
    tasks       a JSON object         -> a question of a public set: prompt, choices, which of them are right
    layouts     a JSON object         -> a record, of the layout that the file's first one has
    records     what a record is: text, prompt and completion, or a conversation
    tokens      a record              -> token ids, and which of them are trained on
    data        a whole file          -> examples no longer than the model's window
    preview     a whole file          -> what the model will see, and what of it is trained on
    batches     examples              -> padded tensors, in an order fixed by the seed
    names       Hugging Face's names  -> the recipe's
    recipe      a run file, options   -> everything that determines a run
    identity    recipe, data, model   -> what must be the same for a run to be resumed
    adapter     a model               -> the same model with LoRA factors; and their files
    elsewhere   what trains elsewhere -> its optimizer
    loop        batches, a model      -> trained factors, one event a step; when to measure and to save
    journal     events                -> metrics.jsonl, TensorBoard where asked for, and whoever watches
    storage     bytes                 -> files and directories that are whole or absent
    checkpoint  a step's state        -> one of these directories, and back
    run         recipe and model      -> a run directory: checkpoints, metrics, adapter

Nothing here knows whether the model is protected.
"""
