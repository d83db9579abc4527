"""The untrusted half: holds matrices it knows nothing about and multiplies by them. Imports the wire alone.

In the order in which a request passes through: `server` (accepts), `connection` (reads requests, sends replies),
`answer` (decides), `store` with `disk` (holds), `compute` (multiplies), `recorder` (writes down all of it).
`sessions` keeps those who are connected apart; `options` and `__main__` start it.
"""
