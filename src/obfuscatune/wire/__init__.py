"""The language that enclave and worker share. Imports neither.

In the order in which a message passes through: `limits` (every number), `deadline` and `errors` (what goes wrong),
`dtypes` and `tensors` (a matrix as bytes, without a copy), `messages` (a header as bytes, pure), `framing` (messages
over a transport), `transport` and `tls_transport` (a stream that carries bytes), `connect` (the enclave's end of it)
and `listen` (the worker's) with `address` and `tls`, `foreign` (who speaks something else), `transcript` (what a
worker recorded, read back).

The format is written down in docs/spec/wire.md.
"""
