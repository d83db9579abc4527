"""`finetune --preview`: what is shown is what is trained on, and no weights are needed for it."""

import json
import shutil

import pytest


@pytest.fixture
def without_weights(stories260k, tmp_path):
    """A model's directory with all but its weights."""
    directory = tmp_path / "model"
    shutil.copytree(stories260k, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    return directory


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.jsonl"
    rows = [
        {"question": "Who is it?", "answer": " Lily\u001b[2J", "id": 1},
        {"question": "Why?", "answer": " " + "Fun and play. " * 8, "id": 2},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FIELDS = ("--fields", "prompt=question,completion=answer")


def test_the_preview_marks_what_is_trained_on_and_counts_the_rest(obfuscatune, without_weights, records, tmp_path):
    ran = obfuscatune(
        *("finetune", "--preview", "--model", without_weights, "--data", records, "--out", tmp_path / "run"),
        *(*FIELDS, "--max-length", 32, "--preview-records", 1),
    )
    assert ran.code == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith(f"--- {records}:1: 15 tokens, 6 trained on")
    assert lines[1] == r"<s> Who is it?[[ Lily\x1b[2J</s>]]"
    assert lines[2] == f"--- {records}: prompt and completion; not used: id"
    assert lines[3].startswith("2 examples, ")
    assert f"longer than 32 tokens: {records}:2 (" in lines[4]
    assert "finetune refuses them" in lines[4]
    assert not (tmp_path / "run").exists()


def test_on_a_terminal_it_is_underlined(obfuscatune, without_weights, records, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    ran = obfuscatune("finetune", "--preview", "--model", without_weights, "--data", records, *FIELDS)
    assert ran.code == 0
    assert "Who is it?\x1b[1;4;32m Lily\\x1b[2J</s>\x1b[0m" in ran.stdout


def test_the_preview_as_a_document(obfuscatune, without_weights, records):
    ran = obfuscatune(
        "finetune", "--preview", "--json", "--model", without_weights, "--data", records, "--eval", records, *FIELDS
    )
    train, held_out = ran.document["sources"]
    assert train == held_out
    assert train["records"] == len(train["examples"]) == 2
    first = train["examples"][0]
    assert [piece["trained"] for piece in first["pieces"]] == [False, True]
    assert first["pieces"][1]["text"] == " Lily\u001b[2J</s>"
    assert (first["tokens"], first["trained_tokens"]) == (15, 6)


def test_a_record_of_which_nothing_that_fits_is_trained_on_is_named(obfuscatune, without_weights, records):
    ran = obfuscatune(
        "finetune", "--preview", "--model", without_weights, "--data", records, *FIELDS, "--max-length", 8
    )
    assert f"nothing to train on in {records}:1; finetune refuses that" in ran.stdout


def test_a_record_that_cannot_be_used_is_refused_in_the_preview_too(obfuscatune, without_weights, records):
    ran = obfuscatune("finetune", "--preview", "--model", without_weights, "--data", records)
    assert ran.code == 1
    assert f"{records}:1: expected the fields" in ran.stderr
    for fields in ("prompt", "prompt=", "=question"):
        ran = obfuscatune("finetune", "--preview", "--data", records, "--fields", fields)
        assert ran.code == 2
        assert "--fields: expected FIELD=COLUMN" in ran.stderr


def test_finetune_says_how_its_records_are_read(obfuscatune, stories260k, records, tmp_path):
    ran = obfuscatune(
        *("finetune", "--plain", "--model", stories260k, "--data", records, "--out", tmp_path / "run"),
        *(*FIELDS, "--max-steps", 1),
    )
    assert ran.code == 0, ran.stderr
    assert f"{records}: prompt and completion; not used: id\n" in ran.stderr
