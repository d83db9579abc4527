"""The owner's side: verify a service, then use it. Runs on his own machine; no torch, no enclave.

connection  an attested session -> HTTPS to the one key that its evidence names
heads       the newest head of its audit log that was seen: a state that was set back is noticed
proxy       a local OpenAI endpoint that refuses the moment verification fails or expires
jobs        submit, watch, fetch the adapter, the receipt, the log
"""

from obfuscatune.client.connection import Service, connect
from obfuscatune.client.heads import HeadFile
from obfuscatune.client.jobs import audit_log, events, fetch_adapter, list_jobs, receipt, submit

__all__ = ["HeadFile", "Service", "audit_log", "connect", "events", "fetch_adapter", "list_jobs", "receipt", "submit"]
