"""The attested service: OpenAI's API on a protected model, several owners, jobs that survive a restart. TRUSTED.

settings  a YAML file -> everything that determines a service; its digest is among the claims
keys      the secrets that providers and owners have released; gone with the process
requests  what the engine is asked, and the events that it answers with
engine    requests -> tokens: continuous batching over one protected model
batch     the sequences that run together: prompts read, tokens chosen; cache holds their keys and values
adapters  fine-tuned models by name, few of them in memory
sampling  logits -> a token and its log-probability, as `generate` draws it
text      tokens -> text, up to a stop string
state     SQLAlchemy: owners, files, jobs, models, usage; what is private is sealed by its owner's key
jobs      fine-tuning in a process of its own; resumed after a restart
api       FastAPI: OpenAI's routes, and ours for parties
audit_log hash-chained: who, what, when, digests
receipt   what a job was, signed
server    all of it, started and stopped
"""
