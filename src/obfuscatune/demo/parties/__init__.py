"""The demo of three parties: `obfuscatune demo --three-parties`, in separate processes, with simulated evidence.

machines  names               -> a directory for each party's user, a network namespace where it may
tap       two machines        -> the bytes that pass between them, forwarded and kept
programs  a machine, a command -> what it said; servers that run until they are stopped
stage     a profile           -> keys, sealed model, workers, enclave, policies; what a party can do
story     a stage             -> the parties' steps in order; what must hold
refusals  a story             -> each attempt that must fail
adversary, openai_client      whoever relays evidence; a client on the owner's machine that knows no enclave
canaries  text, weights       -> runs of bytes to search for; the search
search    a stage that ended  -> what was found where, and the controls
run       settings            -> all scenes, a result
result, page, terminal        what came of it, and how it is shown
"""
