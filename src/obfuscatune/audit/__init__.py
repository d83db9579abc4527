"""`obfuscatune audit`: plays the curious worker on a run of its own, and says in numbers what each profile gives away.

model, text   ->  scenario    a secret model, its public base, private and public text
profile names ->  variants    presets, and unsafe controls of them
scenario      ->  record      a real worker's transcript, and beside it the truth
attacker      ->  attackers   what each kind of attacker holds
all of these  ->  grid        every attack on every profile, over seeds
grid          ->  verdict     in words
              ->  report      a page, JSON, Markdown, a table on the terminal
"""
