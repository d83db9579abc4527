"""lm-evaluation-harness itself, from the shell, on a protected model: our own scorer's numbers on the plain one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from obfuscatune.assets import tiny_model_path
from obfuscatune.evaluation.questions import evaluate_task
from obfuscatune.evaluation.scoring import Pair, score_pairs
from obfuscatune.training.tasks import TASKS, Question
from obfuscatune.training.tokens import encode_pair, end_id

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")

QUESTIONS = [
    Question("Once upon a time, there was a", ("dog", "little girl named Lily", "of and"), (1,)),
    Question("She looked out of the", ("window", "xylophone", "window of the house"), (0,)),
    Question("It was late in the evening when he", ("came home", "blue", "the the"), (0,)),
    Question("Good", ("morning", "quarterly earnings report", "night, said the old man"), (1,)),
    Question("The doctor said that the patient had to stay in", ("bed", "seven", "the garden of his aunt"), (0,)),
]
LOGLIKELIHOOD = 1e-4  # nats, of a sum of some ten float32 terms
TASK = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the embedded model that changes what it says."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def run(folder: Path, **model_args: Any) -> subprocess.CompletedProcess[str]:
    """The command line on the questions; what it finds lies under `folder`/out."""
    data = folder / "choices.jsonl"
    rows = [{"prompt": q.prompt, "choices": q.choices, "label": q.gold[0]} for q in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "local_choices.yaml").write_text(TASK.format(data=data))
    said = ",".join(f"{name}={value}" for name, value in {"pretrained": tiny_model_path(), **model_args}.items())
    command = ["lm-eval", "run", "--model", "obfuscatune", "--model_args", said, "--tasks", "local_choices"]
    command += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
    return subprocess.run(
        [sys.executable, "-m", "obfuscatune", *command, "--batch_size", "4"],
        env={**os.environ, "HF_HOME": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_harness
@pytest.mark.parametrize("name", [None, "peft", "provider_adapter"], ids=["base", "adapter", "provider's adapter"])
def test_the_harness_finds_what_our_scorer_finds(name: str | None, adapter: Path, tmp_path: Path) -> None:
    done = run(tmp_path, profile="private", shield_rows=4, **({name: adapter} if name else {}))
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    (results,) = (tmp_path / "out").rglob("results_*.json")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32).eval()
    if name is not None:
        plain.load_adapter(str(adapter))

    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    for question, sample in zip(QUESTIONS, found, strict=True):
        pairs = [Pair(*map(tuple, encode_pair(tokenizer, question.prompt, f" {c}"))) for c in question.choices]
        scores = score_pairs(plain, pairs, window=512, batch_size=1, pad_id=end_id(tokenizer), advance=lambda _: None)
        answers = [float(resp[0][0]) for resp in sample["resps"]]
        assert answers == pytest.approx([score.loglikelihood for score in scores], abs=LOGLIKELIHOOD)

    summary = json.loads(results.read_text())["results"]["local_choices"]
    acc, acc_norm = evaluate_task(plain, tokenizer, TASKS["sciq"], QUESTIONS, batch_size=4)
    assert (summary["acc,none"], summary["acc_norm,none"]) == (acc.value, acc_norm.value)
    assert summary["acc_stderr,none"] == pytest.approx(acc.stderr)
    assert 0 < acc.value < 1, "a set on which nothing can go wrong shows nothing"


@needs_harness
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"profile": "nonsense"}, "unknown profile"),
        ({"trust_remote_code": True}, "runs no code"),
        ({"dtype": "int8"}, "expected one of float32"),
        ({"parallelize": True}, "loaded by us"),
        ({"provider_adapter": "x", "profile": "paper"}, "would show the worker the provider's adapter"),
        ({"worker": "unix:/nowhere", "profile": "enclave"}, "without a worker"),
        ({"profile": "guarded", "mask_memory": "much"}, "'much' is no size"),
        ({"profile": "guarded", "mask_budget": 0}, "a mask budget is an advantage above 0 and below 1, got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_an_argument_that_cannot_be_used_is_refused(wrong: dict[str, Any], message: str) -> None:
    from obfuscatune.errors import ConfigError
    from obfuscatune.evaluation.harness import ProtectedLM

    with pytest.raises(ConfigError, match=message):
        ProtectedLM(str(tiny_model_path()), **wrong)


@needs_harness
def test_masks_have_the_memory_and_the_budget_that_are_given() -> None:
    from obfuscatune.evaluation.harness import ProtectedLM

    given = ({"mask_memory": 0, "mask_budget": 0.25}, {"mask_memory": "1MiB"}, {})
    for said, memory, budget in zip(given, (0, 1 << 20, 1 << 30), (0.25, 0.01, 0.01), strict=True):
        lm = ProtectedLM(str(tiny_model_path()), "guarded", batch_size=1, **said)
        masks = lm.model.protection.masks
        assert (masks._memory_bytes, masks.account()["budget"]) == (memory, budget)
        lm.close()


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the extra lm-eval is installed")
def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert "pip install 'obfuscatune[lm-eval]'" in done.stderr
    assert done.stderr.count("\n") == 1
