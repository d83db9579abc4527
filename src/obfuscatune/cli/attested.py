"""What the commands of providers and owners have in common: connect to an enclave, verify it, say what was verified."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from obfuscatune.cli import output
from obfuscatune.errors import ConfigError, VerificationFailed
from obfuscatune.option import Option
from obfuscatune.protocol.addresses import TcpAddress, parse_address
from obfuscatune.protocol.files import read_trusted

if TYPE_CHECKING:
    from obfuscatune.attest.collateral import CollateralCache
    from obfuscatune.attest.record import Verification
    from obfuscatune.channel.client import Attested
    from obfuscatune.channel.identity import Identity

ENCLAVE = "Enclave"
"""Heading in the help for the options of `EnclaveOptions`."""


@dataclass(frozen=True, kw_only=True)
class EnclaveOptions:
    """Which enclave, what is accepted of it, and who we are: a group of options."""

    enclave: Annotated[str, Option("Its attested channel, as enclave.example:7700.", ENCLAVE)]
    policy: Annotated[Path, Option("What you accept: a policy in YAML (docs/attestation.md).", ENCLAVE)]
    identity: Annotated[Path, Option("Folder with your cert.pem and key.pem, by `obfuscatune keygen`.", ENCLAVE)]
    pin: Annotated[
        str | None, Option("Fingerprint that its key must have besides.", ENCLAVE, unset="any key that is attested")
    ] = None
    collateral: Annotated[
        Path | None, Option("Folder of Intel's collateral, used in place of the enclave's.", ENCLAVE)
    ] = None
    fetch_collateral: Annotated[
        str | None, Option("Fetch what --collateral lacks: from intel, or a PCCS's https://...", ENCLAVE)
    ] = None
    verification_out: Annotated[
        Path | None, Option("Keep the verification document, for `obfuscatune verify FILE`.", ENCLAVE)
    ] = None

    @contextmanager
    def connected(self) -> "Iterator[tuple[Attested, Identity]]":
        """A session with the enclave, verified, and who we are. What was checked is told first.

        Raises:
            VerificationFailed: the enclave is not what the policy accepts. Nothing was released.
            ConfigError: an option cannot be used.
        """
        from obfuscatune.attest.simulated import WARNING

        if self.verification_out is not None and self.verification_out.exists():
            raise ConfigError(f"{self.verification_out} exists and is not overwritten: choose another name")
        connect, identity = self.connector()
        try:
            channel = connect()
        except VerificationFailed as error:
            output.notice("\n".join(map(str, error.checks)))
            raise
        with channel:
            record = channel.record
            if record.simulated:
                output.stderr().print(WARNING, style="bold red", soft_wrap=True)
            output.notice("\n".join(map(str, record.checks)))
            output.notice(f"verified {self.enclave}, whose key is {channel.enclave_key}")
            self.keep(record)
            yield channel, identity

    def connector(self) -> "tuple[Callable[[], Attested], Identity]":
        """What opens a session and verifies it, each time it is called, and who we are. All files are read here.

        Raises:
            ConfigError: an option cannot be used.
        """
        from obfuscatune.attest.policy import Policy
        from obfuscatune.channel.client import Attested
        from obfuscatune.channel.identity import Identity

        cache, identity = collateral_cache(self.collateral, self.fetch_collateral), Identity.load(self.identity)
        connect = partial(
            Attested.connect,
            parse_enclave(self.enclave),
            identity,
            Policy.from_file(self.policy),
            pinned=None if self.pin is None else {self.pin},
            complete=None if cache is None else cache.complete,
        )
        return connect, identity

    def keep(self, record: "Verification | None") -> None:
        """Write the verification document where --verification-out says.

        Raises:
            ConfigError: it cannot be written.
        """
        from obfuscatune.attest.record import to_file_bytes

        if self.verification_out is not None and record is not None:
            output.write_file(self.verification_out, to_file_bytes(record))


def collateral_cache(folder: Path | None, source: str | None) -> "CollateralCache | None":
    """What --collateral and --fetch-collateral say; None where they say nothing.

    Raises:
        ConfigError: they do not go together, or the source is none.
    """
    from obfuscatune.attest.collateral import INTEL_PCS, CollateralCache, fetch_from

    if folder is None:
        if source is not None:
            raise ConfigError("--fetch-collateral takes --collateral: the folder that it is kept in")
        return None
    if source is not None and source != "intel" and not source.startswith("https://"):
        raise ConfigError(f"--fetch-collateral is intel, or the https:// address of a PCCS, not {source!r:.80}")
    fetch = None if source is None else fetch_from(INTEL_PCS if source == "intel" else source)
    return CollateralCache(folder, fetch)


def parse_enclave(text: str, option: str = "--enclave") -> TcpAddress:
    """An address as host:port or tcp:host:port.

    Raises:
        ConfigError: anything else.
    """
    address = parse_address(text if text.startswith(("tcp:", "unix:")) else f"tcp:{text}")
    if not isinstance(address, TcpAddress) or not address.port:
        raise ConfigError(f"{option} {text}: expected a host and a port, as enclave.example:7700")
    return address


def read_fingerprint(text: str, option: str) -> str:
    """The fingerprint of a party's key, of its certificate's file or as it is.

    Raises:
        ConfigError: it is neither.
    """
    from obfuscatune.protocol.certificates import fingerprint

    if re.fullmatch(r"[0-9a-f]{64}", text):
        return text
    try:
        return fingerprint(read_trusted(Path(text), "certificate"))
    except OSError as error:
        raise ConfigError(f"{option} {text}: {error.strerror or error}") from error
    except ValueError:
        raise ConfigError(f"{option} {text} is no certificate, as `obfuscatune keygen` makes it") from None
