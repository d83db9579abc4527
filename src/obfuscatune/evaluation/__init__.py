"""Answers of a model, protected or plain, scored the way lm-evaluation-harness scores them.

Data passes through the files in this order:

    questions  prompts, completions, a task's questions -> greedy text, choices, an answer and its margin for each
    scoring    answers                                  -> a number with its error; two runs compared
    harness    a task of lm-evaluation-harness          -> its own scores

The question sets are in training/tasks.py: what is asked is also what may be trained on.
"""
