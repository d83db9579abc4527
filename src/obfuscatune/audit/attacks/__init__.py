"""The curious worker: attacks on a transcript, one file each.

    transcript  ->  view         what the worker saw, as matrices and calls
    view + knowledge  ->  attack.run  ->  a guess           no attack ever sees the truth
    guess + truth  ->  attack.score  ->  Finding            value, chance, complete success

`base` has the words, `registry` the list. Shared by several: `geometry` (row spaces, moments), `alignment` (secret
bases from a public relative), `scoring` (measures with their chance level). Imports wire only: who attacks has no
enclave.
"""
