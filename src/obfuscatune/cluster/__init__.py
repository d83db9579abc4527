"""UNTRUSTED. Places workers on an operator's machines and publishes who they are. No enclave, no model, no text.

authority     a folder                     -> the key that signs workers' certificates
node          on a worker's machine        -> a key of its own, the worker's process, its restarts
local, ray_engine   an engine                  -> places: one `node` each, on this machine or as a Ray actor
supervisor    places                       -> certificates signed, workers started, the list of members
publisher     the list                     -> HTTP
state         a folder                     -> one supervisor at a time; how to end it
manifests     numbers                      -> an overlay of deploy/kubernetes, where Kubernetes is the engine
"""
