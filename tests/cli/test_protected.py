"""The commands as users run them: protected, with a real worker process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from obfuscatune.cli.protection import Protection
from obfuscatune.cli.session import open_files, open_session

STORY = ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."

# float32: losses of protected and plain runs differ by rounding, which the steps before have amplified.
LOSS_TOLERANCE = 1e-4


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def finetune(obfuscatune, stories260k, notes, tmp_path):
    """Runs `finetune` for eight steps with dropout and accumulation."""

    def run(name, *options):
        out = tmp_path / name
        ran = obfuscatune(
            *("finetune", "--model", stories260k, "--data", notes, "--eval", notes, "--out", out, "--max-steps", 8),
            *("--batch-size", 3, "--accumulation", 2, "--lr", 0.005, "--lora-dropout", 0.1, "--seed", 7, "--json"),
            *options,
        )
        assert ran.code == 0, ran.stderr
        return out, ran

    return run


def test_protected_and_plain_runs_agree(finetune, worker):
    protected, ran = finetune("protected", "--worker", worker.address)
    plain, _ = finetune("plain", "--plain")
    assert losses(protected) == pytest.approx(losses(plain), abs=LOSS_TOLERANCE)
    assert "PLAIN" not in ran.stderr
    assert ran.document["protected"] is True
    assert ran.document["link"]["crossings"] > 0
    weights, expected = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (protected, plain))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        # Adam divides by the gradient's own size, so a gradient near zero may turn its step of lr = 0.005 either
        # way; all others agree to rounding.
        assert (tensor - expected[name]).abs().mean() < 1e-4, name


def test_the_adapter_is_the_same_in_the_enclave_and_in_plain_peft(finetune, worker, stories260k):
    out, _ = finetune("run", "--worker", worker.address)
    ids = torch.arange(3, 40)[None]
    files = open_files(str(stories260k))
    with open_session(
        files, dtype=None, protection=Protection(worker=worker.address), adapter=out / "adapter"
    ) as session:
        inside = session.model(ids).logits
    model = AutoModelForCausalLM.from_pretrained(stories260k)
    outside = PeftModel.from_pretrained(model, out / "adapter").eval()(ids).logits
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-4)


def test_answers_are_the_same_but_for_ties(obfuscatune, finetune, worker, stories260k, shared_data):
    out, _ = finetune("run", "--worker", worker.address)
    ran = obfuscatune(
        *("evaluate", "--model", stories260k, "--adapter", out / "adapter", "--task", "openbookqa"),
        *("--data-dir", shared_data, "--limit", 25, "--worker", worker.address, "--compare-plain", "--json"),
    )
    assert ran.code == 0, ran.stderr
    assert [run["protected"] for run in ran.document["runs"]] == [True, False]
    assert [found["metric"] for found in ran.document["comparisons"]] == ["acc", "acc_norm"]
    for found in ran.document["comparisons"]:
        assert found["differing"] == found["ties"]


def test_comparison_is_told_to_people(obfuscatune, worker, stories260k, notes):
    ran = obfuscatune(
        *("evaluate", "--model", stories260k, "--data", notes, "--limit", 4),
        *("--worker", worker.address, "--compare-plain"),
    )
    assert ran.code == 0, ran.stderr
    assert "protected (" in ran.stdout
    assert "crossings to the worker" in ran.stdout
    assert "answered differently by exact_match: 0, of which ties: 0" in ran.stdout


def test_generate_starts_a_worker_of_its_own(obfuscatune, stories260k):
    ran = obfuscatune(
        *("generate", "--model", stories260k, "--prompt", "Once upon a time", "--max-new-tokens", 48, "--json")
    )
    assert ran.code == 0, ran.stderr
    assert ran.document["text"].startswith(STORY)
    assert ran.document["link"]["uploads"] > 0


def test_the_first_block_stays_in_the_enclave(obfuscatune, stories260k, worker):
    crossings = []
    for blocks in (0, 1):
        ran = obfuscatune(
            *("generate", "--model", stories260k, "--prompt", "Once", "--max-new-tokens", 4, "--json"),
            *("--worker", worker.address, "--first-blocks", blocks),
        )
        crossings.append(ran.document["link"]["crossings"])
    assert crossings[1] == crossings[0] * 4 / 5  # of five blocks


def test_a_key_file_is_made_for_its_owner_alone_and_used_again(obfuscatune, stories260k, worker, tmp_path):
    key = tmp_path / "root.key"
    command = ("generate", "--model", stories260k, "--prompt", "Once upon a time", "--json", "--worker", worker.address)
    first = obfuscatune(*command, "--key-file", key)
    assert key.stat().st_mode & 0o777 == 0o600
    assert obfuscatune(*command, "--key-file", key).document["text"] == first.document["text"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--profile", "secret"), 2, "unknown profile 'secret'"),
        (("--worker", "somewhere"), 2, "the address 'somewhere' cannot be used"),
        (("--tls-cert", "a.pem"), 2, "TLS takes --tls-cert, --tls-key and --peer, all three"),
        (
            ("--tls-cert", "{id}/cert.pem", "--tls-key", "{id}/key.pem", "--peer", "{id}/cert.pem"),
            2,
            "by --worker tcp:",
        ),
        (("--worker", "tcp:10.0.0.1:1"), 2, "give both sides --tls-cert, --tls-key and --peer"),
        (("--plain", "--worker", "unix:/x"), 2, "--plain protects nothing: leave it out, or --worker"),
        (("--plain", "--first-blocks", "1"), 2, "leave it out, or --first-blocks"),
        (("--worker", "tcp:127.0.0.1:1", "--tls-cert", "a", "--tls-key", "b", "--peer", "c"), 2, "cannot use TLS"),
        (("--first-blocks", "-1"), 2, "first_blocks must not be negative"),
        (("--key-file", "/absent/root.key"), 1, "cannot write the key file /absent/root.key"),
    ],
)
def test_what_cannot_be_protected_is_one_line(obfuscatune, stories260k, tmp_path, options, code, message):
    assert obfuscatune("keygen", "--out", tmp_path / "id").code == 0
    filled = [option.format(id=tmp_path / "id") for option in options]
    ran = obfuscatune("generate", "--model", stories260k, "--prompt", "a", "--json", *filled)
    assert (ran.code, ran.stdout) == (code, "")
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


def test_tls_from_keygen_to_generate(obfuscatune, stories260k, tmp_path):
    for side in ("enclave", "worker"):
        assert obfuscatune("keygen", "--out", tmp_path / side).code == 0
    enclave, worker = (tmp_path / side for side in ("enclave", "worker"))
    command = (
        *("worker", "--listen", "tcp:127.0.0.1:0", "--json"),
        *("--tls-cert", worker / "cert.pem", "--tls-key", worker / "key.pem", "--peer", enclave / "cert.pem"),
    )
    with started(*command) as process:
        address = json.loads(process.stdout.readline())["address"]
        ran = obfuscatune(
            *("generate", "--model", stories260k, "--prompt", "Once upon a time", "--json", "--worker", address),
            *("--tls-cert", enclave / "cert.pem", "--tls-key", enclave / "key.pem", "--peer", worker / "cert.pem"),
        )
    assert ran.code == 0, ran.stderr
    assert ran.document["text"].startswith(STORY)


def children(pid: int) -> list[int]:
    """Processes that any of its threads has started."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command line as a process of its own, which does not outlive the test."""
    command = [sys.executable, "-m", "obfuscatune", *map(str, arguments)]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background of a shell it is ignored, and inherited
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.long
def test_a_run_killed_from_outside_is_resumed(finetune, tmp_path):
    whole, _ = finetune("whole", "--checkpoint-every", 2)
    out = tmp_path / "killed"
    with started("finetune", *yaml_options(whole, out)) as process:
        wait_until(lambda: steps_taken(out) >= 3)
        (worker,) = children(process.pid)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    # The worker that it had started notices, and goes.
    wait_until(lambda: not Path(f"/proc/{worker}").exists() or is_zombie(worker))
    _, ran = finetune("killed", "--checkpoint-every", 2, "--resume")
    assert "going on after step" in ran.stderr
    assert losses(out) == pytest.approx(losses(whole), abs=LOSS_TOLERANCE)


@pytest.mark.long
def test_a_run_survives_the_death_of_its_worker(finetune, worker, tmp_path):
    whole, _ = finetune("whole", "--worker", worker.address)
    recipe = yaml.safe_load((whole / "recipe.yaml").read_text()) | {"worker": None}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "bereaved"
    with started("finetune", "--config", tmp_path / "own.yaml", "--out", out) as process:
        for steps in (1, 4):
            wait_until(lambda steps=steps: steps_taken(out) >= steps)
            (own_worker,) = children(process.pid)
            os.kill(own_worker, signal.SIGKILL)
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
    assert "the worker ended unexpectedly; starting it again" in told
    assert losses(out) == pytest.approx(losses(whole), abs=LOSS_TOLERANCE)


def test_ctrl_c_says_how_to_go_on(stories260k, notes, tmp_path):
    out = tmp_path / "run"
    command = ("finetune", "--plain", "--model", stories260k, "--data", notes, "--out", out, "--max-steps", 100_000)
    with started(*command) as process:
        wait_until(lambda: steps_taken(out) >= 1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-2:] == [
        f"to go on: obfuscatune finetune --config {out / 'recipe.yaml'} --resume",
        "interrupted",
    ]


@pytest.mark.parametrize(("signum", "plain"), [(signal.SIGTERM, []), (signal.SIGHUP, ["--plain"])])
def test_a_signal_lets_the_step_finish_and_writes_a_checkpoint(stories260k, notes, tmp_path, signum, plain):
    out = tmp_path / "run"
    command = ("finetune", *plain, "--model", stories260k, "--data", notes, "--out", out, "--max-steps", 100_000)
    with started(*command, "--checkpoint-every", 100_000) as process:
        wait_until(lambda: steps_taken(out) >= 1, seconds=120)
        own_workers = children(process.pid)
        process.send_signal(signum)
        stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (128 + signum, "")
    told, end = stderr.splitlines()[-2:]
    assert told == f"to go on: obfuscatune finetune --config {out / 'recipe.yaml'} --resume"
    step = re.fullmatch(rf"stopped by {signum.name}: stopped after step (\d+) of 100000: a checkpoint is written", end)
    assert os.listdir(out / "checkpoints") == [f"step-{int(step[1]):06d}"]
    assert len(own_workers) == (not plain)
    for worker in own_workers:
        wait_until(lambda worker=worker: not Path(f"/proc/{worker}").exists() or is_zombie(worker))


def test_a_finished_run_is_extended(finetune, worker, tmp_path):
    out, _ = finetune("run", "--worker", worker.address)
    before = losses(out)
    _, ran = finetune("run", "--worker", worker.address, "--resume", "--max-steps", 10)
    assert "the run is extended from 8 to 10 steps; from here on the learning rate follows" in ran.stderr
    assert losses(out)[:8] == before
    assert ran.document["steps"] == 10


def steps_taken(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count('"grad_norm"') if metrics.exists() else 0


def yaml_options(whole: Path, out: Path) -> list[str]:
    """The options that begin the run of another directory once more."""
    return ["--config", str(whole / "recipe.yaml"), "--out", str(out)]


def is_zombie(pid: int) -> bool:
    """Ended, and orphaned in a container whose first process does not reap."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_embedded_model_learns_facts_by_heart(obfuscatune, worker, notes, tmp_path):
    out = tmp_path / "run"
    before = obfuscatune("evaluate", "--data", notes, "--worker", worker.address, "--json")
    ran = obfuscatune(
        *("finetune", "--data", notes, "--worker", worker.address, "--out", out),
        *("--epochs", 20, "--lr", 0.005, "--lora-dropout", 0),
    )
    assert ran.code == 0, ran.stderr
    after = obfuscatune(
        *("evaluate", "--data", notes, "--worker", worker.address, "--adapter", out / "adapter", "--json")
    )
    values = [found.document["runs"][0]["metrics"]["exact_match"]["value"] for found in (before, after)]
    assert values[0] == 0
    assert values[1] > 0.9


def test_what_does_not_fit_is_refused_before_a_worker_is_started(obfuscatune, stories260k, notes, tmp_path):
    shallow = ("--model", stories260k, "--lora-targets", "q_proj,up")
    ran = obfuscatune("finetune", *shallow, "--data", notes, "--out", tmp_path / "run")
    assert ran.code == 2
    assert ran.stderr.splitlines()[-1].startswith("error: --lora-targets: the model has no layer up; the linear")
    assert "worker" not in ran.stderr
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    ran = obfuscatune("generate", "--model", stories260k, "--adapter", adapter, "--prompt", "Hi")
    assert ran.code == 1
    assert "adapter_model.safetensors: does not fit the model: base_model.model." in ran.stderr
    assert "worker" not in ran.stderr
