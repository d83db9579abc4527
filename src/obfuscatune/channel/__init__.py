"""The attested channel: TLS 1.3, both sides known by key, evidence bound, secrets sealed to the attested key. No torch.

identity   a party's key and certificate
session    TLS 1.3 over a socket, with its exporter
messages   framed, bounded, strictly parsed
binding    what ties a session to its connection (with attest.binding), and a secret to its session
hpke       a secret for one attested key
grants     what a provider signs: terms, consents, revocations
registry   decides what they allow
measure    what started a process: command line, environment, configuration
server     the enclave's side
client     the side that verifies

docs/spec/attested-channel.md is the specification.
"""
