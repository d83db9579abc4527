"""`obfuscatune audit`: what it refuses, and one whole run."""

import json

import pytest


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--attacker", "everybody"], "expected all or one of closed"),
        (["--profile", "private:first_blocks"], "KNOB=VALUE"),
        (["--profile", "enclave"], "nothing to audit"),
        (["--data", "/nowhere.txt", "--profile", "private"], "cannot be read"),
        (["--data", "a.txt", "--data", "embedded"], "at most one for each --model"),
        (["--tokens-per-call", "7"], "--tokens-per-call"),
        (["--tokens-per-call", "100000"], "reads at most"),
    ],
)
def test_what_cannot_be_audited_is_refused(obfuscatune, tmp_path, options, says):
    ran = obfuscatune("audit", *options, "--out", tmp_path / "out")
    assert ran.code in (1, 2)
    assert says in ran.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_run_with_nothing_hidden_fails_the_limit(obfuscatune, tmp_path):
    options = ("--profile", "identity", "--attacker", "closed", "--seeds", "1", "--fail-above", "0.5")
    ran = obfuscatune("audit", *options, "--out", tmp_path)
    assert ran.code == 1
    assert "above 0.5: equal-rows on tiny-gpt2, identity" in ran.stderr
    stages = (
        "tiny-gpt2: reading the model and the text",
        "tiny-gpt2: tuning the secret model",
        "auditing: tiny-gpt2, identity, seed 0: recording",
    )
    assert [line for line in ran.stderr.splitlines() if line in stages] == list(stages)
    assert "open, and not promised" in ran.stdout
    figures = json.loads((tmp_path / "audit.json").read_text())
    assert {cell["attacker"] for cell in figures["cells"]} == {"closed"}
    for name in ("report.html", "audit.md"):
        assert "equal-rows" in (tmp_path / name).read_text("utf-8")
