"""OpenAI's API over HTTPS, and what the parties ask for beside it.

tls          the certificate in memory; clients known by key; the key in each request's scope
errors       every failure in OpenAI's form
context      what a route needs of the service, and who asks
requests     bodies of completions, strictly parsed
answers      completions and chat: body -> engine_requests -> engine -> choices -> rendering
multipart    an upload, streamed into memory
files        /v1/files
fine_tuning  /v1/fine_tuning/jobs, and fine-tuned models
parties      /obfuscatune/v1: receipts, adapters, the audit log, evidence
app          all routes, and the bounds of a request
"""
