"""The owner's and the provider's side: verify a service, then use it. Runs on their own machines; no torch, no enclave.

identity   a party's keys, in one directory
connection a verified service: HTTPS pinned to what its evidence names
proxy      a local OpenAI endpoint that refuses the moment verification fails or expires
jobs       submit, watch, fetch the adapter by consent
"""
