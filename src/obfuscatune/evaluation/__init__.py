"""Answers of a model, protected or plain, scored the way lm-evaluation-harness scores them.

Data passes through the files in this order:

    scoring    prompts, continuations   -> log-likelihoods; answers -> a number with its error; two runs compared
    choices    a task's questions       -> accuracy, with an answer and its margin for every question
    questions  prompts, completions     -> greedy text, exact match, an answer for every question

The question sets are in tuning/tasks.py: what is asked is also what may be trained on.
"""
