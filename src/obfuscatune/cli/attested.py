"""What the commands of providers and owners have in common: connect to an enclave, verify it, say what was verified."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cryptography import x509

from obfuscatune import documents
from obfuscatune.cli import output
from obfuscatune.errors import ConfigError, StorageError, VerificationFailed
from obfuscatune.option import Option
from obfuscatune.protocol.endpoints import Address, TcpAddress, parse_address

if TYPE_CHECKING:
    from obfuscatune.channel.client import Attested
    from obfuscatune.channel.identity import Identity

ENCLAVE = "Enclave"
"""Heading in the help for the options of `EnclaveOptions`."""


@dataclass(frozen=True, kw_only=True)
class EnclaveOptions:
    """Which enclave, what is accepted of it, and who we are. With `with_options`, a group of options."""

    enclave: Annotated[str, Option("Its attested channel, as enclave.example:7700.", ENCLAVE)]
    policy: Annotated[Path, Option("What is accepted of it: a policy in YAML (docs/attestation.md).", ENCLAVE)]
    identity: Annotated[Path, Option("Folder with your cert.pem and key.pem, by `obfuscatune keygen`.", ENCLAVE)]
    pin: Annotated[
        str | None, Option("The fingerprint that its key must have besides.", ENCLAVE, unset="any key that is attested")
    ] = None
    verification_out: Annotated[
        Path | None,
        Option(
            "Keep what was verified, for others to verify again: `obfuscatune verify FILE`.", ENCLAVE, unset="not kept"
        ),
    ] = None

    @contextmanager
    def connected(self) -> "Iterator[tuple[Attested, Identity]]":
        """A session with the enclave, which was verified, and ourselves. What was checked is told first.

        Raises:
            VerificationFailed: the enclave is not what the policy accepts. Nothing was released.
            ConfigError: an option cannot be used.
        """
        from obfuscatune.attest.policy import Policy
        from obfuscatune.channel.client import Attested
        from obfuscatune.channel.identity import Identity

        address, policy, identity = parse_enclave(self.enclave), Policy.from_file(self.policy), Identity.load(self.identity)
        if self.verification_out is not None and not self.verification_out.parent.is_dir():
            raise ConfigError(f"--verification-out {self.verification_out}: there is no such folder")
        try:
            channel = Attested.connect(address, identity, policy, pinned=None if self.pin is None else {self.pin})
        except VerificationFailed as error:
            output.notice("\n".join(map(str, error.checks)))
            raise
        with channel:
            self._tell(channel)
            yield channel, identity

    def _tell(self, channel: "Attested") -> None:
        from obfuscatune.attest.simulated import WARNING

        output.notice("\n".join(map(str, channel.verified.checks)))
        if channel.verified.simulated:
            output.stderr().print(WARNING, style="bold red", markup=False)
        output.notice(f"verified {self.enclave}, whose key is {channel.enclave_key}")
        if self.verification_out is not None:
            try:
                self.verification_out.write_bytes(documents.canonical(channel.verification_document()))
            except OSError as error:
                raise StorageError(f"cannot write {self.verification_out}: {error.strerror or error}") from error


def parse_enclave(text: str) -> TcpAddress:
    """host:port, or tcp:host:port.

    Raises:
        ConfigError: anything else.
    """
    address: Address | None = None
    if not text.startswith("unix:"):
        address = parse_address(text if text.startswith("tcp:") else f"tcp:{text}")
    if not isinstance(address, TcpAddress) or not address.port:
        raise ConfigError(f"--enclave {text}: expected a host and a port, as enclave.example:7700")
    return address


def read_fingerprint(path: Path, option: str) -> str:
    """The fingerprint of a certificate's key.

    Raises:
        ConfigError: the file is no certificate.
    """
    from obfuscatune.channel.identity import key_digest
    from obfuscatune.protocol.files import read_trusted

    try:
        return key_digest(x509.load_pem_x509_certificate(read_trusted(path, "certificate"))).hex()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror or error}") from error
    except ValueError:
        raise ConfigError(f"{option} {path} is no certificate, as `obfuscatune keygen` makes it") from None
