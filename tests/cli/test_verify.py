"""`obfuscatune verify`: line by line, its exit codes, and the document that a third person checks again."""

from __future__ import annotations

import json

import pytest
import yaml

from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.record import Session, to_file_bytes
from obfuscatune.attest.simulated import WARNING, Simulated
from obfuscatune.cli.app import run
from tests.attest.made import BINDING, CLAIMS, KEY, NOW, REPORT_DATA, simulated_policy


@pytest.fixture
def files(tmp_path):
    """An evidence file, the policy that it meets, and the one that refuses it."""
    session = Session(Simulated(KEY).attest(REPORT_DATA), CLAIMS, BINDING, NOW)
    (tmp_path / "evidence.json").write_bytes(to_file_bytes(session))
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(simulated_policy()))
    (tmp_path / "strict.yaml").write_text(yaml.safe_dump(simulated_policy(allow_simulated=False)))
    return tmp_path


def verify(files, *arguments, record="evidence.json"):
    return run(["verify", str(files / record), *map(str, arguments)])


def test_every_check_is_a_line_and_simulation_is_loud(files, capsys):
    assert verify(files, "--policy", files / "policy.yaml", "--now", NOW) == 0
    out, err = capsys.readouterr()
    assert "holds  simulated.report_data: " in out
    assert "FAILS" not in out
    assert WARNING in out and WARNING in err
    assert "at 2026-" in out and "verified: " in out


def test_what_fails_is_named_and_is_the_exit_code(files, capsys):
    assert verify(files, "--policy", files / "strict.yaml", "--now", NOW) == 1
    out, err = capsys.readouterr()
    assert "FAILS  simulated.allowed: expected allow_simulated: true in the policy, found no such line" in out
    assert "verified" not in out
    assert "checks fail: simulated.allowed" in err


def test_evidence_of_another_day_is_too_old(files, capsys):
    assert verify(files, "--policy", files / "policy.yaml", "--now", "2027-01-01T00:00:00Z") == 1
    assert "FAILS  freshness" in capsys.readouterr().out


def test_a_verification_document_is_verified_again(files, capsys):
    document = files / "verified.json"
    assert verify(files, "--policy", files / "policy.yaml", "--now", NOW, "--out", document) == 0
    capsys.readouterr()
    assert verify(files, record="verified.json") == 0
    assert "by the document's own policy" in capsys.readouterr().out
    assert verify(files, "--policy", files / "strict.yaml", record="verified.json") == 1
    assert verify(files, "--policy", files / "policy.yaml", "--now", NOW, "--out", document) == 2  # not overwritten


def test_a_document_that_was_changed_is_found_out(files, capsys):
    document = files / "verified.json"
    assert verify(files, "--policy", files / "strict.yaml", "--now", NOW, "--out", document) == 1
    forged = json.loads(document.read_text())
    for check in forged["checks"]:
        check["passed"] = True
    document.write_text(json.dumps(forged | {"passed": True}))
    capsys.readouterr()
    assert verify(files, record="verified.json") == 1
    assert "not those that its evidence and policy give" in capsys.readouterr().err


def test_json_is_one_document(files, capsys):
    assert verify(files, "--policy", files / "strict.yaml", "--now", NOW, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["passed"], document["simulated"], document["recorded_checks_differ"]) == (False, True, False)
    assert [check["name"] for check in document["checks"] if not check["passed"]] == ["simulated.allowed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "takes --policy"),
        (("--policy", "none.yaml"), "cannot be read"),
        (("--policy", "policy.yaml", "--now", "noon"), "--now is a time"),
        (("--policy", "policy.yaml", "--now", "9" * 30), "--now is a time"),
        (("--policy", "policy.yaml", "--fetch-collateral", "intel"), "takes --collateral"),
        (("--policy", "policy.yaml", "--collateral", "c", "--fetch-collateral", "ftp://x"), "https"),
        (("--policy", "policy.yaml", "--out", "absent/verified.json"), "cannot write"),
    ],
)
def test_what_cannot_be_done_is_one_line(files, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    assert verify(files, *arguments) == 2
    err = capsys.readouterr().err.replace(WARNING + "\n", "")
    assert message in err and err.count("\n") == 1


def test_collateral_of_a_folder_takes_the_place_of_the_attesters(files, capsys):
    quote = Evidence("tdx", b"junk")
    session = Session(quote, CLAIMS, BINDING, NOW)
    (files / "tdx.json").write_bytes(to_file_bytes(session))
    pytest.importorskip("dcap_qvl")
    arguments = ("--policy", files / "policy.yaml", "--now", NOW, "--collateral", files / "collateral")
    assert verify(files, *arguments, record="tdx.json") == 1
    assert "tdx" in capsys.readouterr().err
