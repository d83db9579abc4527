"""Answers of a model, protected or plain, scored the way lm-evaluation-harness scores them.

Data passes through the files in this order:

    scoring    prompts, continuations   -> log-likelihoods
    choices    a task's questions       -> accuracy, with an answer and its margin for every question
    questions  prompts, completions     -> greedy text, exact match, an answer for every question
    results    those answers            -> one number, and its standard error
    compare    two results              -> the questions answered differently, and which of them are ties

The question sets are in tuning/tasks.py: what is asked is also what may be trained on.
"""
