"""The attested channel: TLS 1.3, both sides known by key, evidence bound, secrets sealed to the attested key. No torch.

binding   report data of a session (design of docs/spec/attested-channel.md)
session   TLS 1.3 over a socket, with its exporter
messages  framed, bounded, strictly parsed
hpke      a secret for one attested key
grants    the provider's terms: who may do what with a model, until when
server    the enclave's side
client    the side that verifies
"""
