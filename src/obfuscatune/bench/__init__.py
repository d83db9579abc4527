"""Side-by-side measurements: protected and plain, in turn, in one run, each in a process of its own.

step (the command's work)  ->  contender (one process each, in turn)  ->  table and JSON (results)
"""
