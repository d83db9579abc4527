"""Evidence of the platform that this program runs on: configfs-tsm (TDX, SEV-SNP), a TPM 2.0, several joined."""

import base64
import contextlib
import re
import secrets
import ssl
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from obfuscatune.attest.evidence import Evidence, Kind, Producer, check_report_data
from obfuscatune.attest.snp import REPORT_BYTES
from obfuscatune.attest.tpm import PCRS, tpm_nonce
from obfuscatune.errors import ConfigError, EvidenceError

TSM_ROOT = Path("/sys/kernel/config/tsm/report")
MOST_BLOB_BYTES = 64 * 1024
"""Of a quote, and of the table of certificates beside a report: the kernel's own limit is 32 KiB."""
_PROVIDERS: dict[str, Kind] = {"tdx_guest": "tdx", "sev_guest": "sev-snp"}
_VCEK, _VLEK = "63da758d-e664-4564-adc5-f4b93be8accd", "a8074bc2-a25a-483e-aae6-39c045a0b8a1"
_ASK, _ARK = "4ab7b379-bbac-4fe4-a02f-05aef327c782", "c0b406a4-a803-4952-9743-3fb6014cd0ae"
_CRL = "92f81bc3-5811-4d3d-97ff-d19f88dc67ea"
"""GHCB specification (publication 56421), table of certificates; the bytes of a GUID lie as it is written."""


class ConfigfsTsm:
    """TDX and SEV-SNP by the kernel's one interface (Linux 6.7, Documentation/ABI/testing/configfs-tsm).

    Args:
        certificates: VCEK or VLEK, ASK, ARK as DER, where the host provides none beside an SEV-SNP report.
        root: Where the kernel's folder is.
    """

    def __init__(self, certificates: tuple[bytes, ...] = (), root: Path = TSM_ROOT) -> None:
        self._certificates, self._root = certificates, root

    def attest(self, report_data: bytes) -> Evidence:
        """Evidence over 64 bytes.

        Raises:
            EvidenceError: the kernel has no such interface, gave none, or somebody else wrote to our request.
        """
        check_report_data(report_data)
        request = self._root / f"obfuscatune-{secrets.token_hex(8)}"
        try:
            request.mkdir(mode=0o700)
        except OSError as error:
            raise EvidenceError(
                f"no evidence from {self._root}: {error.strerror}; it takes a confidential VM (TDX, SEV-SNP) with "
                "Linux 6.7 or newer, configfs mounted, and the right to make folders there"
            ) from error
        try:
            return self._ask(request, report_data)
        except (OSError, ValueError) as error:
            raise EvidenceError(f"no evidence from {self._root}: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                request.rmdir()

    def _ask(self, request: Path, report_data: bytes) -> Evidence:
        provider = _read(request / "provider").decode("ascii", "replace").strip()
        kind = _PROVIDERS.get(provider)
        if kind is None:
            raise EvidenceError(f"{self._root} is served by {provider!r:.80}; known are {', '.join(_PROVIDERS)}")
        before = _generation(request)
        (request / "inblob").write_bytes(report_data)
        quote = _read(request / "outblob")
        table = _read(request / "auxblob") if kind == "sev-snp" and (request / "auxblob").exists() else b""
        if _generation(request) != before + 1:
            raise EvidenceError("somebody else wrote to our request for evidence")
        if report_data not in quote[:REPORT_BYTES]:
            raise EvidenceError("the platform's evidence is not over the report data that it was asked for")
        if kind == "tdx":
            return Evidence("tdx", quote)
        return self._with_certificates(quote, table)

    def _with_certificates(self, report: bytes, table: bytes) -> Evidence:
        found = read_certificate_table(table)
        leaf = found.get(_VLEK) or found.get(_VCEK)
        provided = tuple(it for it in (leaf, found.get(_ASK), found.get(_ARK)) if it is not None)
        collateral = {"crl": base64.b64encode(found[_CRL]).decode()} if _CRL in found else {}
        certificates = provided if len(provided) == 3 else self._certificates
        return Evidence("sev-snp", report, certificates, collateral)


def read_certificate_table(table: bytes) -> dict[str, bytes]:
    """Certificates (DER) by GUID, of the table that the host provides. The host is not trusted: all is bounded.

    Raises:
        EvidenceError: an entry lies outside of the table.
    """
    found: dict[str, bytes] = {}
    for at in range(0, len(table) - 23, 24):
        guid, offset, length = struct.unpack_from("<16sII", table, at)
        if not any(guid):
            return found
        if offset + length > len(table):
            raise EvidenceError("the host's table of certificates names bytes outside of it")
        found[str(uuid.UUID(bytes=guid))] = _as_der(table[offset : offset + length])
    if any(table):
        raise EvidenceError("the host's table of certificates has no end")
    return found


def _as_der(certificate: bytes) -> bytes:
    if not certificate.startswith(b"-----BEGIN"):
        return certificate
    try:
        return ssl.PEM_cert_to_DER_cert(certificate.decode("ascii").strip("\0 \n"))
    except ValueError as error:
        raise EvidenceError("a certificate of the host's table is malformed") from error


class Tpm:
    """A TPM 2.0 by tpm2-tools, with an ECC attestation key that lies in it.

    Args:
        handle: Of the key: `0x81010002`.
        pcrs: Which registers of SHA-256 are quoted.
        tcti: How the tools reach the TPM; None is their own default.
    """

    def __init__(self, handle: str, pcrs: Sequence[int], tcti: str | None = None) -> None:
        if not re.fullmatch(r"0x[0-9a-fA-F]{8}", handle):
            raise ConfigError(f"{handle!r:.80} is no handle of a TPM's key, such as 0x81010002")
        if not pcrs or not set(pcrs) <= set(range(PCRS)):
            raise ConfigError(f"PCRs are numbers from 0 to {PCRS - 1}, one or more")
        self._handle, self._pcrs, self._tcti = handle, sorted(set(pcrs)), tcti

    def attest(self, report_data: bytes) -> Evidence:
        """Evidence over 64 bytes.

        Raises:
            EvidenceError: there is no TPM, no such key, or no tpm2-tools.
        """
        nonce = tpm_nonce(check_report_data(report_data)).hex()
        with tempfile.TemporaryDirectory(prefix="obfuscatune-tpm-") as name:
            folder = Path(name)
            key, attest, signature, values = (folder / it for it in ("key", "attest", "signature", "values"))
            bank = "sha256:" + ",".join(map(str, self._pcrs))
            self._run("tpm2_readpublic", "-c", self._handle, "-f", "der", "-o", str(key))
            self._run(
                *("tpm2_quote", "-c", self._handle, "-l", bank, "-q", nonce, "-g", "sha256"),
                *("-m", str(attest), "-s", str(signature), "-o", str(values), "-F", "values"),
            )
            message = _read(attest)
            quoted = _read(values)
            quote = struct.pack(">H", len(message)) + message + _read(signature)
            spki = _read(key)
        if len(quoted) != 32 * len(self._pcrs):
            raise EvidenceError("tpm: tpm2_quote gave other values than those asked for")
        collateral = {f"pcr.{pcr}": quoted[32 * index : 32 * index + 32].hex() for index, pcr in enumerate(self._pcrs)}
        return Evidence("tpm", quote, (spki,), collateral)

    def _run(self, tool: str, *arguments: str) -> None:
        command = [tool, *arguments, *(() if self._tcti is None else ("-T", self._tcti))]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EvidenceError(f"tpm: {tool} cannot be run: {error}; install tpm2-tools") from error
        if done.returncode:
            said = " ".join(done.stderr.decode("utf-8", "replace").split())
            raise EvidenceError(f"tpm: {tool} failed ({done.returncode}): {said:.300}")


class Joined:
    """Several producers over the same report data: a CPU's evidence, and in its parts those of TPM and GPUs."""

    def __init__(self, first: Producer, *others: Producer) -> None:
        self._producers = (first, *others)

    def attest(self, report_data: bytes) -> Evidence:
        """Evidence over 64 bytes.

        Raises:
            EvidenceError: one of them gave none.
        """
        first, *others = (producer.attest(report_data) for producer in self._producers)
        parts = [part for it in others for part in it.each]
        return replace(first, parts=(*first.parts, *(replace(part, parts=()) for part in parts)))


def _generation(request: Path) -> int:
    return int(_read(request / "generation"))


def _read(path: Path) -> bytes:
    """A file of bounded size."""
    with path.open("rb") as file:
        data = file.read(MOST_BLOB_BYTES + 1)
    if len(data) > MOST_BLOB_BYTES:
        raise EvidenceError(f"{path.name}: more than {MOST_BLOB_BYTES:,} bytes")
    return data
