"""Evidence: where a program runs, made and verified. Imports documents, errors, protocol alone; no torch.

claims         what the program says of itself: role, keys, configuration, workers; their digest is bound
evidence       a quote or report with its certificates and collateral, as one JSON document
producers      the platform's evidence over 64 bytes of report data: configfs-tsm, TPM, simulated
tdx, snp, nvidia, tpm, simulated    one verifier each: signatures up to a pinned root, and the fields that say what ran
policy         a YAML file: what is accepted
verification   evidence and policy -> every check, the verified claims; or VerificationFailed
"""
