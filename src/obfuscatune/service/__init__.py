"""The attested service: OpenAI's API on a protected model, several owners, jobs that survive a restart. TRUSTED.

settings      a YAML file -> everything that determines a service; its digest is among the claims
keys          the secrets that owners have released, and what is derived of them; gone with the process
state         SQLAlchemy: owners, files, jobs, models, usage (tables); what is private is sealed by its owner's key
sealed_files  a run directory whose files are sealed
audit_log     hash-chained: who, what, when, digests
provider_words  what providers said or are to answer, over restarts: grants' order, revocations, consents
handler       what the attested channel brings: grants, keys, consents
access        grants, their terms, and the tokens that were used under them
limits        how much one owner may take
models        a bundle and its key -> a protected model with an engine (opening)
engine        requests -> tokens: continuous batching over one protected model (engine_limits, requests, batch, cache,
              adapters, text)
sampling      logits -> a token and its log-probability, as `generate` draws it
api/          FastAPI: OpenAI's routes, and ours for parties
jobs          fine-tuning in a process of its own (job_process, trainer, job_results); resumed after a restart
receipt       what a job was, signed
metrics       for Prometheus: sums over all owners
server        all of it, started and stopped
"""
