"""`obfuscatune keygen`."""

from pathlib import Path
from typing import Annotated

from obfuscatune.cli import output
from obfuscatune.cli.options import AsJson
from obfuscatune.errors import ConfigError
from obfuscatune.option import Option


def keygen(
    out: Annotated[Path, Option("Folder for cert.pem and key.pem; made if missing.")],
    name: Annotated[str, Option("Who it is, for people to read.")] = "obfuscatune",
    as_json: AsJson = False,
) -> None:
    """Make the certificate and the private key of a party: an enclave or a worker, a provider or an owner.

    Once for each. For TLS, give each side the other's cert.pem as --peer, over a channel you trust, and compare the
    fingerprints. A provider and an owner sign documents with the same key. key.pem stays where it is.
    """
    from obfuscatune.protocol.certificates import CERTIFICATE, KEY, fingerprint, make_identity

    if not 1 <= len(name) <= 64:
        raise ConfigError("--name has 1 to 64 characters")
    certificate, key = make_identity(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror or error}") from error
    output.write_file(out / KEY, key, 0o600)  # keys in use are never overwritten
    output.write_file(out / CERTIFICATE, certificate)
    result = {"certificate": str(out / CERTIFICATE), "key": str(out / KEY), "fingerprint": fingerprint(certificate)}
    output.write_result(result, output.labelled(result), as_json=as_json)
