"""Answers of a model, protected or plain, scored the way lm-evaluation-harness scores them.

Data passes through the files in this order:

    tasks      a task's own record      -> a question: prompt, choices, which of them are right
    scoring    prompts, continuations   -> log-likelihoods
    choices    a task's questions       -> accuracy, with an answer and its margin for every question
    questions  prompts, completions     -> greedy text, exact match, an answer for every question
    compare    two results              -> the questions answered differently, and which of them are ties
"""
