"""An operator's authority as files: `cert.pem` for the enclave's policy, `key.pem` for nobody."""

from dataclasses import dataclass
from pathlib import Path

from obfuscatune.errors import ConfigError
from obfuscatune.protocol.authority import issue, load_authority, make_authority
from obfuscatune.protocol.certificates import CERTIFICATE, KEY, fingerprint
from obfuscatune.protocol.files import read_secret, read_trusted, write_new


@dataclass(frozen=True, repr=False)
class Authority:
    """Signs the certificates of one operator's workers."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return f"Authority({self.fingerprint})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its public key, in hex: what operator and enclave compare."""
        return fingerprint(self.certificate)

    def issue(self, request_pem: bytes, name: str) -> bytes:
        """The certificate of a worker that asks for it, PEM. Raises ConfigError: the request is none."""
        return issue(request_pem, name, self.certificate, self.key)

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """The one that `create` made.

        Raises:
            ConfigError: a file is missing, not what it should be, or others can read the key.
        """
        try:
            certificate = read_trusted(folder / CERTIFICATE, "authority's certificate")
            key = read_secret(folder / KEY, "authority's private key")
        except OSError as error:
            raise ConfigError(
                f"cannot read {error.filename}: {error.strerror}; `obfuscatune fleet authority` makes it"
            ) from error
        load_authority(certificate)
        return cls(certificate, key)

    @classmethod
    def create(cls, folder: Path, operator: str) -> "Authority":
        """Make a new one in `folder`.

        Raises:
            ConfigError: there is one already, which is not overwritten, or the folder cannot be written to.
        """
        certificate, key = make_authority(operator)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_new(folder / KEY, key, 0o600)
            write_new(folder / CERTIFICATE, certificate, 0o644)
        except FileExistsError as error:
            raise ConfigError(
                f"{error.filename or folder} exists and is not overwritten: choose another folder"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
        return cls(certificate, key)

    @classmethod
    def load_or_create(cls, folder: Path, operator: str) -> "Authority":
        """The one in `folder`, made if the folder has none. Raises ConfigError: as `load` and `create`."""
        return cls.load(folder) if (folder / CERTIFICATE).exists() else cls.create(folder, operator)
