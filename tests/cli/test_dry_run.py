"""`finetune --dry-run` counts what the run then does, and touches neither a worker nor the disk."""

import pytest

from obfuscatune.assets import tiny_model_path

NOWHERE = ("--worker", "unix:/nowhere/worker.sock")


@pytest.fixture
def command(notes, tmp_path):
    return ("finetune", "--data", notes, "--eval", notes, "--out", tmp_path / "run", "--batch-size", 5, "--epochs", 2)


def test_it_counts_what_the_run_then_does(obfuscatune, command, worker, tmp_path):
    options = ("--worker", worker.address, "--json")
    dry = obfuscatune(*command, *options, "--dry-run").document
    assert not (tmp_path / "run").exists()
    ran = obfuscatune(*command, *options).document
    assert (dry["steps"], dry["steps_per_epoch"], dry["forward_passes"], dry["measurements"]) == (6, 3, 6, 2)
    assert dry["steps"] == ran["steps"]
    assert dry["data"]["trained_tokens"] * 2 == ran["tokens"]
    assert dry["crossings"] < ran["link"]["crossings"], "the passes of the measurements come on top"
    assert dry["worker"]["bytes_sent_once"] < ran["link"]["bytes_sent"]
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert dry["adapter"]["parameters"] * 4 == pytest.approx(weights.stat().st_size, rel=0.1)


def test_it_is_told_to_people(obfuscatune, command):
    ran = obfuscatune(*command, *NOWHERE, "--dry-run")
    assert ran.code == 0, ran.stderr
    words = [line.split()[0] for line in ran.stdout.splitlines()]
    assert words == ["data", "steps", "measured", "adapter", "here", "worker", "crossings", "out"]
    assert "sent once to unix:/nowhere/worker.sock, profile private" in ran.stdout
    assert "a dry run: nothing was sent, nothing was written" in ran.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora-targets", "nope"), "the model has no layer nope"),
        (("--profile", "secret"), "unknown profile 'secret'"),
        (("--max-length", 100_000), "and the model's window is"),
    ],
)
def test_what_the_run_would_refuse_is_refused(obfuscatune, command, options, message):
    ran = obfuscatune(*command, *NOWHERE, "--model", tiny_model_path(), *options, "--dry-run")
    assert ran.code == 2
    assert message in ran.stderr


def test_a_plain_run_has_no_worker(obfuscatune, command):
    ran = obfuscatune(*command, "--plain", "--dry-run")
    assert ran.code == 0, ran.stderr
    assert "worker     none: a plain run" in ran.stdout
