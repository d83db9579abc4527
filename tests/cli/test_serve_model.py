"""`--public-base` as users give it, with workers that serve the model; and where it cannot be."""

import pytest

from obfuscatune.assets import tiny_model_path
from obfuscatune.enclave.local_worker import local_worker

BOTH = "matrices served by the workers themselves: compute worker 12 of 12, mask worker 12 of 12"
"""All of the embedded model behind its first block."""


@pytest.fixture(scope="module")
def serving():
    """Options that name two workers which serve the embedded model."""
    options = ("--serve-model", str(tiny_model_path()))
    with local_worker(threads=1, extra=options) as compute, local_worker(threads=1, extra=options) as mask:
        yield "--worker", compute.address, "--mask-worker", mask.address


@pytest.fixture
def commands(notes, tmp_path):
    return {
        "generate": ("generate", "--prompt", "It was", "--max-new-tokens", 2),
        "finetune": ("finetune", "--data", notes, "--out", tmp_path / "run", "--max-steps", 1),
        "evaluate": ("evaluate", "--data", notes, "--limit", 1),
    }


@pytest.mark.parametrize("name", ["generate", "finetune", "evaluate"])
def test_it_says_how_much_was_served(obfuscatune, commands, serving, name):
    ran = obfuscatune(*commands[name], "--profile", "guarded", "--public-base", *serving)
    assert ran.code == 0, ran.stderr
    assert BOTH in ran.stderr.splitlines()


def test_a_run_file_says_it_too(obfuscatune, serving, notes, tmp_path):
    run_file = tmp_path / "run.yaml"
    run_file.write_text(f"profile: guarded\npublic_base: true\ndata: {notes}\nmax_steps: 1\nout: {tmp_path / 'run'}\n")
    ran = obfuscatune("finetune", "--config", run_file, *serving, "--json")
    assert ran.code == 0, ran.stderr
    assert BOTH in ran.stderr.splitlines()
    assert (ran.document["link"]["served"], ran.document["link"]["uploads"]) == (12, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "public_base=True (--public-base) needs one-time masks, which profile 'private' does not have"),
        (("--profile", "guarded", "--base", "closed"), "--public-base says that the weights are published, --base"),
        (("--plain",), "--plain protects nothing: leave it out, or --public-base"),
    ],
)
@pytest.mark.parametrize("name", ["generate", "finetune"])
def test_what_is_refused(obfuscatune, commands, name, options, said):
    ran = obfuscatune(*commands[name], "--public-base", *options)
    assert ran.code == 2
    assert ran.stderr.splitlines()[-1].startswith("error: ")
    assert said in ran.stderr.splitlines()[-1]
