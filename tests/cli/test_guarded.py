"""`finetune --profile guarded` as users run it: two workers, the account of masks, and what is refused."""

import json

import pytest


@pytest.fixture
def finetune(obfuscatune, stories260k, notes, tmp_path, worker, mask_worker):
    """Runs `finetune` for some steps under masks, or with other options."""

    def run(steps, *options, **workers):
        named = {"worker": worker.address, "mask-worker": mask_worker.address} | workers
        return obfuscatune(
            *("finetune", "--profile", "guarded", "--model", stories260k, "--data", notes, "--out", tmp_path / "run"),
            *(part for name, address in named.items() if address for part in (f"--{name}", address)),
            *("--max-steps", steps, "--batch-size", 3, "--lr", 0.005),
            *options,
        )

    return run


def test_the_account_is_told_written_and_goes_on_when_a_run_is_resumed(finetune, tmp_path):
    ran = finetune(2)
    assert ran.code == 0, ran.stderr
    assert "rows under masks: whoever has all that the worker saw tells two texts apart" in ran.stdout
    first = json.loads((tmp_path / "run" / "run.json").read_text())["masks"]
    assert 0 < first["advantage"] < first["budget"] == 0.01
    assert first["rows"] > 0
    resumed = finetune(4, "--resume", "--json")
    assert resumed.code == 0, resumed.stderr
    second = resumed.document["masks"]
    assert second["rows"] == pytest.approx(2 * first["rows"], rel=0.2)
    assert second["mu"] == pytest.approx(2**0.5 * first["mu"], rel=0.1)


@pytest.mark.parametrize("content", ["{", '{"rows": 1, "mu": NaN}'])
def test_a_damaged_account_is_not_taken_for_an_empty_one(finetune, tmp_path, content):
    assert finetune(1).code == 0
    (tmp_path / "run" / "masks.json").write_text(content)
    ran = finetune(2, "--resume")
    assert ran.code == 1
    assert "masks.json cannot be read, and has what the run had shown so far" in ran.stderr


@pytest.mark.parametrize(
    ("options", "workers", "said"),
    [
        ((), {"mask-worker": None}, "takes two workers in different hands"),
        (("--profile", "private"), {}, "has no masks"),
        (("--mask-budget", "2"), {}, "--mask-budget: expected an advantage above 0 and below 1, found 2"),
        (("--mask-memory", "much"), {}, "'much' is no size"),
        (("--mask-budget", "1e-9"), {}, "the mask budget; 0 rows were sent"),
    ],
)
def test_what_is_refused(finetune, options, workers, said):
    ran = finetune(1, *options, **workers)
    assert ran.code in (1, 2)
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr
