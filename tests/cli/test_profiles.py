"""`--profile paper` and `--profile enclave` as users run them: trained on the worker, saved, resumed, asked."""

from __future__ import annotations

import json
import shutil


def test_a_run_of_the_paper_s_scheme(obfuscatune, notes, worker, tmp_path):
    out = tmp_path / "run"
    command = (
        *("finetune", "--data", notes, "--eval", notes, "--out", out, "--max-steps", 4, "--checkpoint-every", 2),
        *("--batch-size", 3, "--lr", 0.005, "--lora-dropout", 0.0, "--profile", "paper", "--worker", worker.address),
    )
    ran = obfuscatune(*command, "--json")
    assert ran.code == 0, ran.stderr
    assert "PROFILE paper: the scheme as published. It hides less than private" in ran.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert measured[-1] < measured[0]
    assert all(line["grad_norm"] > 0 for line in lines if "loss" in line)

    shutil.rmtree(out / "checkpoints" / "step-000004")
    resumed = obfuscatune(*command, "--resume")  # under another key, for none was given
    assert resumed.code == 0, resumed.stderr
    assert "going on after step 2 of 4" in resumed.stderr

    asked = ("generate", "--adapter", out / "adapter", "--prompt", "The cat", "--max-new-tokens", 12, "--json")
    answers = [
        obfuscatune(*asked, *options).document["text"]
        for options in (("--plain",), ("--profile", "paper", "--worker", worker.address), ("--profile", "enclave"))
    ]
    assert answers[0] == answers[1] == answers[2]


def test_gradient_checkpointing_is_refused(obfuscatune, notes, worker, tmp_path):
    ran = obfuscatune(
        *("finetune", "--data", notes, "--out", tmp_path / "run", "--profile", "paper", "--worker", worker.address),
        "--gradient-checkpointing",
    )
    assert ran.code == 1
    assert "gradient checkpointing computes a block twice" in ran.stderr


def test_the_enclave_alone_has_no_worker(obfuscatune, notes, tmp_path):
    command = ("finetune", "--data", notes, "--out", tmp_path / "run", "--max-steps", 1, "--profile", "enclave")
    ran = obfuscatune(*command, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["link"]["crossings"] == 0
    ran = obfuscatune(*command, "--out", tmp_path / "other", "--worker", "unix:/nowhere")
    assert ran.code == 2
    assert "--profile enclave runs without a worker" in ran.stderr
