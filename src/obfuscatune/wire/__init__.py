"""The language that enclave and worker share. Imports neither.

In the order in which a message passes through: `limits` (every number), `deadline` and `errors` (what goes wrong),
`dtypes` and `tensors` (a matrix as bytes, without a copy), `messages` (a header as bytes, pure), `address`, `tls` and
`transport` (a stream that carries bytes), `framing` (messages over a transport), `transcript` (what a worker
recorded, read back).

The format is written down in docs/spec/wire.md.
"""
