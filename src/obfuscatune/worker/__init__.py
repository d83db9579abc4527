"""The untrusted half: holds matrices it knows nothing about and multiplies by them. Imports what is shared alone.

In the order in which a request passes through: `server` (accepts), `greeting` (learns who is there), `connection`
with `intake` (reads requests, sends replies) and `buffers` (its memory), `answer` (decides), `store` with `disk`
(holds), `turns` and `compute` (multiply), `recorder` (writes down all of it). `memory` is what a matrix that stays
lies in. `sessions` keeps those who are connected apart, and `quota` divides what they share; `__main__`, `options` and
`run` start it.
"""
