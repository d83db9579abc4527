"""Genuine evidence, from ../shared: tests skip where it is absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.attest.made import Amd, Gpu

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "attestation"
Sample = Callable[[str], bytes]
Chain = Callable[[str], tuple[bytes, ...]]


@pytest.fixture(scope="session")
def sample() -> Sample:
    """The bytes of a sample; of those in hex, what the hex stands for."""
    if not SAMPLES.is_dir():
        pytest.skip(f"no samples in {SAMPLES}")

    def read(name: str) -> bytes:
        data = (SAMPLES / name).read_bytes()
        is_hex = name.endswith(".hex") or "Report.txt" in name or "report1.txt" in name
        return bytes.fromhex(data.decode().strip().removeprefix("0x")) if is_hex else data

    return read


@pytest.fixture(scope="session")
def chain(sample: Sample) -> Chain:
    """The certificates of a PEM file, as DER."""

    def read(name: str) -> tuple[bytes, ...]:
        return tuple(it.public_bytes(Encoding.DER) for it in x509.load_pem_x509_certificates(sample(name)))

    return read


@pytest.fixture(scope="session")
def genoa() -> Amd:
    return Amd.make("Genoa")


@pytest.fixture(scope="session")
def turin() -> Amd:
    return Amd.make("Turin")


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    return Gpu.make()
