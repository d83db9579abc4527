"""TRUSTED. Holds the secrets, the text and the small parameters; everything large goes to a worker.

How a model comes under protection:
    profiles -> load / protect -> checkpoint | spool -> sites -> obfuscate (keys, transforms) -> protection -> link

How a call passes through:
    modules -> linear (transforms, mixing) -> link -> worker -> link -> linear -> modules

Beside these: `plan` counts what would run where, `published` warns of a public base,
`protected_model` has a protected one's methods,
`local` starts a worker on this machine, `orthogonal` has the random matrices that transforms and mixing are made of,
and `sums` what a product is checked with.
"""
