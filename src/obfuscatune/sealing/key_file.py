"""The file that a bundle's key is kept in, with what a grant names the bundle by."""

from dataclasses import dataclass
from pathlib import Path

from obfuscatune import documents
from obfuscatune.errors import ConfigError, IntegrityError
from obfuscatune.protocol.files import read_secret, write_new
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.manifest import KINDS
from obfuscatune.secret_memory import SecretBytes

_HEX_FIELDS = ("key", "manifest", "signer")


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What opens one bundle: a JSON file that its owner keeps to himself. A grant names the last three as they are."""

    key: BundleKey
    manifest_digest: str
    signer: str
    """Ed25519 public key, in hex."""
    kind: str

    def write(self, path: Path) -> None:
        """Make the file, for this user alone.

        Raises:
            FileExistsError: there is one already; it is not touched.
            OSError: it cannot be written.
        """
        with self.key.secret.view as view:
            document = {"version": 1, "kind": self.kind, "key": view.hex()}
        write_new(path, documents.canonical(document | {"manifest": self.manifest_digest, "signer": self.signer}))

    @classmethod
    def read(cls, path: Path) -> "KeyFile":
        """Read what `write` wrote.

        Raises:
            ConfigError: it cannot be read, others can read it, or it is no key file.
        """
        try:
            document = documents.parse(read_secret(path, "key file"), most_bytes=4096)
        except OSError as error:
            raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from error
        except IntegrityError:
            document = {}
        if set(document) != {"version", "kind", *_HEX_FIELDS} or document["version"] != 1:
            raise ConfigError(f"{path} is no key file of a bundle, as `provider seal --key-out` writes it")
        if document["kind"] not in KINDS or not all(documents.is_hex(document[name]) for name in _HEX_FIELDS):
            raise ConfigError(f"{path}: a field of the key file is not what it should be")
        key = BundleKey(SecretBytes(bytes.fromhex(document["key"])))
        return cls(key, document["manifest"], document["signer"], document["kind"])
