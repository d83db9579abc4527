"""Evidence: where a program runs, made and verified. Imports documents, errors, protocol alone; no torch.

claims         what the program says of itself: role, keys, configuration, workers; their digest is bound
binding        one session, as 64 bytes of report data
evidence       a quote or report with its certificates and collateral, as one JSON document
producers      the platform's evidence over the report data: configfs-tsm, TPM, several joined
checks         what was checked, one line each
dcap, snp, nvidia, tpm, simulated    one verifier each: signatures up to a pinned root, and the fields that say what ran
fields         fields one behind another, and signatures of two numbers, as several of them have
amd, der       AMD's certificates, and X.509 as far as they need it
collateral     Intel's, in a folder: the one file beside policy_file and producers that reads anything
policy_file    YAML and signed reference values, read strictly
policy         what is accepted
verification   evidence and policy -> every check, the verified claims; or VerificationFailed. No input, no output
record         evidence files, and verification documents that a third person checks again
"""
