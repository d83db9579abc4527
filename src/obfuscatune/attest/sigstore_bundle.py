"""A sigstore bundle over a file: who signed it, by which identity provider's word, and that a transparency log has it.

Nothing is fetched. Certificate authority, logs and timestamp authorities are those of a trusted root that the caller
has as a file, in sigstore's format; the package `sigstore` makes the checks.
"""

from pathlib import Path

from obfuscatune.attest.checks import shown
from obfuscatune.errors import ConfigError, IntegrityError


def verify_bundle(content: bytes, bundle: bytes, trusted_root: Path, *, identity: str, issuer: str) -> None:
    """See that a file is what an identity signed.

    Args:
        content: of the file.
        bundle: JSON, with the signature of a message: an attestation about one is refused.
        trusted_root: a file.
        identity: in the signing certificate: an e-mail address, or the URI of a workflow.
        issuer: the identity provider that vouched for it.

    Raises:
        IntegrityError: it is not; the message has the reason.
        ConfigError: the trusted root cannot be read, or `sigstore` is not installed.
    """
    try:
        from sigstore.models import Bundle, TrustedRoot
        from sigstore.verify import Verifier, policy
    except ImportError as error:
        raise ConfigError(f"sigstore bundles take sigstore ({error}): pip install 'obfuscatune[sigstore]'") from error
    try:
        verifier = Verifier(trusted_root=TrustedRoot.from_file(str(trusted_root)))
    except OSError as error:
        raise ConfigError(f"{trusted_root}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # pydantic's, sigstore's, cryptography's
        raise ConfigError(f"{trusted_root} is no trusted root of sigstore: {_said(error)}") from error
    try:
        signer = policy.Identity(identity=identity, issuer=issuer)
        verifier.verify_artifact(content, Bundle.from_json(bundle), signer)
    except Exception as error:  # whatever comes of a file that an enemy may have written
        raise IntegrityError(f"the sigstore bundle is refused: {_said(error)}") from error


def _said(error: Exception) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__)
