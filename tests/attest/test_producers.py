"""Evidence of the kernel's configfs-tsm, played by a directory tree."""

from __future__ import annotations

import base64
import struct
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.attest.checks import Checks
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.policy import SnpPolicy
from obfuscatune.attest.producers import ConfigfsTsm, Joined, read_certificate_table
from obfuscatune.attest.simulated import Simulated
from obfuscatune.attest.snp import check_snp
from obfuscatune.documents import canonical
from obfuscatune.errors import EvidenceError
from tests.attest.made import KEY, NOW, REPORT_DATA, SNP_POLICY

VCEK, VLEK = "63da758d-e664-4564-adc5-f4b93be8accd", "a8074bc2-a25a-483e-aae6-39c045a0b8a1"
ASK, ARK = "4ab7b379-bbac-4fe4-a02f-05aef327c782", "c0b406a4-a803-4952-9743-3fb6014cd0ae"
CRL = "92f81bc3-5811-4d3d-97ff-d19f88dc67ea"


def table(entries: dict[str, bytes]) -> bytes:
    """The host's table of certificates, as the GHCB specification lays it out."""
    at, head, body = 24 * (len(entries) + 1), b"", b""
    for guid, content in entries.items():
        head += uuid.UUID(guid).bytes + struct.pack("<II", at + len(body), len(content))
        body += content
    return head + bytes(24) + body


class Kernel:
    """Plays the kernel: what it makes in a new folder, and what lies there once `inblob` was written."""

    def __init__(self, root: Path, provider: str, answer, aux: bytes = b"", *, meddle: bool = False) -> None:
        self.root, self.provider, self.answer, self.aux, self.meddle = root, provider, answer, aux, meddle

    def mkdir(self, path: Path) -> None:
        (path / "provider").write_text(self.provider + "\n")
        (path / "generation").write_text("0\n")
        self.path = path

    def asked(self, data: bytes) -> None:
        (self.path / "outblob").write_bytes(self.answer(data))
        if self.aux:
            (self.path / "auxblob").write_bytes(self.aux)
        (self.path / "generation").write_text("2\n" if self.meddle else "1\n")


@pytest.fixture
def play(tmp_path, monkeypatch):
    """A kernel under `tmp_path`: configfs makes and removes files of its own accord, which a directory does not."""

    def start(kernel: Kernel) -> Path:
        make, write, remove = Path.mkdir, Path.write_bytes, Path.rmdir

        def mkdir(path, *arguments, **more):
            make(path, *arguments, **more)
            if path.parent == kernel.root:
                kernel.mkdir(path)

        def write_bytes(path, data):
            if path.name == "inblob":
                kernel.asked(data)
                return len(data)
            return write(path, data)

        def rmdir(path):
            for file in path.iterdir():
                file.unlink()
            remove(path)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        monkeypatch.setattr(Path, "rmdir", rmdir)
        return kernel.root

    return start


def quote_of(data: bytes) -> bytes:
    return bytes(48 + 520) + data + bytes(1000)


def test_a_quote_of_tdx(tmp_path, play):
    root = play(Kernel(tmp_path, "tdx_guest", quote_of))
    assert ConfigfsTsm(root=root).attest(REPORT_DATA) == Evidence("tdx", quote_of(REPORT_DATA))
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("vlek", [False, True])
def test_a_report_of_sev_snp_with_the_hosts_certificates_verifies(tmp_path, play, genoa, vlek):
    leaf, ask, ark = genoa.certificates(vlek=vlek)
    entries = {VLEK if vlek else VCEK: leaf, ASK: ask, ARK: ark, CRL: genoa.crl()}
    root = play(Kernel(tmp_path, "sev_guest", lambda data: genoa.report(data, vlek=vlek), table(entries) + bytes(100)))
    evidence = Evidence.from_bytes(ConfigfsTsm(root=root).attest(REPORT_DATA).to_bytes())
    checks = Checks()
    wanted = SnpPolicy.model_validate_json(canonical(SNP_POLICY | {"require_crl": True}))
    check_snp(evidence, wanted, report_data=REPORT_DATA, now=NOW, checks=checks, roots=genoa.roots)
    assert not checks.failed


def test_certificates_of_ones_own_where_the_host_has_none(tmp_path, play, genoa):
    own = genoa.certificates()
    root = play(Kernel(tmp_path, "sev_guest", genoa.report))
    assert ConfigfsTsm(own, root).attest(REPORT_DATA).certificates == own


def test_somebody_elses_write_is_noticed(tmp_path, play):
    root = play(Kernel(tmp_path, "tdx_guest", quote_of, meddle=True))
    with pytest.raises(EvidenceError, match="somebody else"):
        ConfigfsTsm(root=root).attest(REPORT_DATA)
    assert list(root.iterdir()) == []


def test_an_answer_over_other_data_is_noticed(tmp_path, play):
    root = play(Kernel(tmp_path, "tdx_guest", lambda data: quote_of(bytes(64))))
    with pytest.raises(EvidenceError, match="report data"):
        ConfigfsTsm(root=root).attest(REPORT_DATA)


def test_an_answer_without_end_is_not_read(tmp_path, play):
    root = play(Kernel(tmp_path, "tdx_guest", lambda data: data * 2000))
    with pytest.raises(EvidenceError, match="more than"):
        ConfigfsTsm(root=root).attest(REPORT_DATA)


def test_an_unknown_platform_is_named(tmp_path, play):
    root = play(Kernel(tmp_path, "arm_cca_guest", quote_of))
    with pytest.raises(EvidenceError, match="arm_cca_guest"):
        ConfigfsTsm(root=root).attest(REPORT_DATA)


def test_without_the_interface_there_is_no_evidence(tmp_path):
    with pytest.raises(EvidenceError, match="confidential VM"):
        ConfigfsTsm(root=tmp_path / "absent").attest(REPORT_DATA)
    with pytest.raises(EvidenceError, match="no evidence"):
        ConfigfsTsm(root=tmp_path).attest(REPORT_DATA)  # a folder, and no kernel behind it


def test_each_request_has_a_folder_of_its_own(tmp_path, monkeypatch, play):
    root = play(Kernel(tmp_path, "tdx_guest", quote_of))
    names, make = [], Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, **more: (names.append(path.name), make(path, **more)))
    for _ in range(5):
        ConfigfsTsm(root=root).attest(REPORT_DATA)
    assert len(set(names)) == 5


def test_the_table_of_certificates_is_read_as_the_host_lays_it(genoa):
    leaf, ask, ark = genoa.certificates()
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(ask) + b"-----END CERTIFICATE-----\n"
    assert read_certificate_table(table({VCEK: leaf, ASK: pem, ARK: ark})) == {VCEK: leaf, ASK: ask, ARK: ark}
    assert read_certificate_table(b"") == read_certificate_table(bytes(4096)) == {}


@pytest.mark.parametrize("entry", [(24, 2**32 - 1), (2**32 - 1, 24), (48, 1)])
def test_a_table_that_names_bytes_outside_of_it_is_refused(entry):
    with pytest.raises(EvidenceError, match="outside"):
        read_certificate_table(uuid.UUID(VCEK).bytes + struct.pack("<II", *entry) + bytes(24))


def test_a_table_without_end_is_refused():
    with pytest.raises(EvidenceError, match="no end"):
        read_certificate_table(uuid.UUID(VCEK).bytes + struct.pack("<II", 0, 1))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_junk_is_a_table_or_refused(junk):
    try:
        found = read_certificate_table(junk)
    except EvidenceError:
        return
    assert sum(map(len, found.values())) <= len(junk) * max(1, len(found))


def test_joined_evidence_has_one_list_of_parts():
    inner = Joined(Simulated(KEY), Simulated(KEY))
    found = Joined(inner, inner).attest(REPORT_DATA)
    assert len(found.parts) == 3
    assert Evidence.from_bytes(found.to_bytes()) == found
