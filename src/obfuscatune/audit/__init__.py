"""`obfuscatune audit`: plays the curious worker on a run of its own, and says in numbers what each profile gives away.

scenario   a model, text      -> a secret model, its public base, private and public text
attackers  names              -> the profiles that are tried, and what each kind of attacker holds
record     a scenario         -> a real worker's transcript, and beside it the truth
attacks/   a transcript       -> what was recovered, and what luck would have recovered
grid       all of these       -> every attack on every profile, over seeds
verdict    the grid           -> the same in words
report     grid and verdict   -> a page, JSON, Markdown, a table on the terminal
"""
