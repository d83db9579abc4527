"""Whole runs: what they leave, what they refuse, and that death costs them nothing."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from obfuscatune.errors import ConfigError, ModelFileError, NonFiniteError, StorageError
from obfuscatune.training import storage
from obfuscatune.training.adapter import adapter_files, add_lora, load_adapter
from obfuscatune.training.checkpoint import model_fingerprint
from obfuscatune.training.journal import Measured, Started
from obfuscatune.training.loop import StepEvent
from obfuscatune.training.provider_adapter import load_provider_adapter
from obfuscatune.training.recipe import Recipe, load_recipe
from obfuscatune.training.run import finetune, load_data

RECORDS = [{"prompt": f"{i} plus one is", "completion": f" {i + 1}"} for i in range(10)]


@pytest.fixture
def run(model, tokenizer, jsonl, tmp_path):
    """Runs a recipe on a fresh copy of the model; returns the outcome and all events."""
    data = jsonl(*RECORDS)

    def start(*, resume=False, fingerprint="m", base=model, **fields):
        settings = {"data": data, "out": tmp_path / "out", "plain": True, "lora_r": 2, "batch_size": 4, "epochs": 2}
        recipe = Recipe(**settings | fields)
        own = copy.deepcopy(base)
        events = []
        outcome = finetune(
            own,
            tokenizer,
            recipe,
            load_data(recipe, tokenizer, own.config),
            fingerprint=fingerprint,
            report=events.append,
            resume_run=resume,
        )
        return outcome, events

    return start


def test_a_run_leaves_what_its_directory_promises(run, jsonl, tmp_path):
    outcome, events = run(eval=jsonl(*RECORDS[:3]), eval_every=2, checkpoint_every=4)
    out = tmp_path / "out"
    assert [type(event) for event in events[:2]] == [Started, Measured]
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event.epoch for event in steps] == [1, 1, 1, 2, 2, 2]
    assert [event.step for event in events if isinstance(event, Measured)] == [0, 2, 4, 6]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6]
    assert [line["loss"] for line in lines if "loss" in line] == [event.loss for event in steps]
    assert sorted(os.listdir(out / "checkpoints")) == ["step-000004", "step-000006"]
    summary = json.loads((out / "run.json").read_text())
    assert (summary["steps"], summary["last_loss"]) == (6, steps[-1].loss)
    assert load_recipe(out / "recipe.yaml", {}).lora_r == 2
    assert outcome.adapter == out / "adapter"


def test_the_adapter_is_the_trained_model(run, model):
    outcome, _ = run()
    ids = torch.arange(8)[None]
    assert torch.equal(load_adapter(model, outcome.adapter)(ids).logits, outcome.model(ids).logits)


def test_recipe_and_model_must_name_the_same_provider(run, model, tmp_path):
    write_adapter(tmp_path / "provider", copy.deepcopy(model), seed=1)
    write_adapter(tmp_path / "other", copy.deepcopy(model), seed=2)
    stacked = load_provider_adapter(copy.deepcopy(model), tmp_path / "provider")
    for base, named in ((model, "provider"), (stacked, None), (stacked, "other")):
        with pytest.raises(ConfigError, match="another provider's adapter than the recipe names"):
            run(base=base, provider_adapter=named and tmp_path / named)
    outcome, _ = run(base=stacked, provider_adapter=tmp_path / "provider")
    assert list(outcome.model.peft_config) == ["provider", "default"]
    with pytest.raises(ModelFileError, match="was trained on top of the provider's adapter"):
        load_adapter(model, outcome.adapter)


def write_adapter(folder, model, seed):
    folder.mkdir()
    for name, content in adapter_files(
        add_lora(model, r=2, alpha=2, dropout=0, targets="all-linear", seed=seed)
    ).items():
        (folder / name).write_bytes(content)


def test_training_learns(run):
    _, events = run(epochs=20, lr=0.03, lora_dropout=0.0)
    losses = [event.loss for event in events if isinstance(event, StepEvent)]
    assert losses[-1] < losses[0] - 0.1  # it adapts random weights, whose head stays random


def test_gradient_checkpointing_changes_the_memory_and_nothing_else(run, tmp_path):
    # Activations computed twice from the same seeds: the same numbers.
    losses = []
    for name, on in (("off", False), ("on", True)):
        _, events = run(out=tmp_path / name, gradient_checkpointing=on)
        losses.append([event.loss for event in events if isinstance(event, StepEvent)])
    assert losses[0] == losses[1]


def test_a_directory_that_holds_a_run_is_not_overwritten(run):
    run()
    with pytest.raises(ConfigError, match=r"holds a run; go on with it by --resume, or choose another --out"):
        run()


def test_to_resume_a_complete_run_is_to_have_its_result(run):
    first, _ = run()
    again, events = run(resume=True)
    assert [type(event) for event in events] == [Started]
    assert again.progress == first.progress


def test_to_resume_nothing_is_to_begin(run, tmp_path):
    assert run(resume=True, out=tmp_path / "new")[0].progress.step == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.5}, "lr was 0.0002 and is 0.5"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"epochs": 1}, "epochs was 2 and is 1"),
        ({"max_steps": 30}, "max_steps was None and is 30"),
        ({"epochs": 3, "lr": 0.5}, "lr was 0.0002 and is 0.5; epochs was 2 and is 3"),
        ({"profile": "guarded"}, "profile was 'private' and is 'guarded'"),
        ({"fingerprint": "other"}, "model was 'm' and is 'other'"),
        ({"lora_targets": ("c_attn",)}, r"lora_targets was 'all-linear' and is \['c_attn'\]"),
    ],
)
def test_another_recipe_is_not_resumed(run, change, message):
    run()
    with pytest.raises(ConfigError, match=f"cannot resume, this is another run: {message}"):
        run(resume=True, **change)


def test_other_data_are_not_resumed_and_data_elsewhere_are(run, jsonl):
    run()
    with pytest.raises(ConfigError, match="data was"):
        run(resume=True, data=jsonl(*RECORDS[1:], RECORDS[0]))
    run(resume=True, data=jsonl(*RECORDS))
    with pytest.raises(ConfigError, match="eval was None and is"):
        run(resume=True, eval=jsonl(*RECORDS))


def test_a_run_may_be_resumed_with_other_checkpoints(run):
    run()
    run(resume=True, checkpoint_every=1)


def test_a_length_beyond_the_window_is_refused(run):
    with pytest.raises(ConfigError, match="--max-length: 65 tokens, and the model's window is 64"):
        run(max_length=65)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(run, monkeypatch, tmp_path):
    real = storage._write_durably

    def write(name: str, content: bytes, folder: int) -> None:
        if "step-000004" in os.readlink(f"/proc/self/fd/{folder}") and name.endswith("optimizer.safetensors"):
            raise OSError(28, "No space left on device")
        real(name, content, folder)

    monkeypatch.setattr(storage, "_write_durably", write)
    with pytest.raises(StorageError, match="step-000004: the disk refused: No space left on device"):
        run(checkpoint_every=2)
    assert os.listdir(tmp_path / "out" / "checkpoints") == ["step-000002"]
    monkeypatch.setattr(storage, "_write_durably", real)
    _, events = run(resume=True, checkpoint_every=2)
    assert events[0].first_step == 2


def test_a_run_that_diverges_keeps_its_last_checkpoint(run, model, tmp_path):
    with pytest.raises(NonFiniteError):
        run(lr=100, weight_decay=1e30, checkpoint_every=1, clip=1e30)
    assert (tmp_path / "out" / "checkpoints" / "step-000001").is_dir()


@pytest.mark.long
def test_death_at_any_moment_costs_nothing(model, tokenizer, jsonl, tmp_path):
    model_dir = tmp_path / "model"
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    script = Path(__file__).with_name("killed_runs.py")
    result = subprocess.run(
        [sys.executable, script, model_dir, jsonl(*RECORDS), tmp_path / "runs"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    deaths = json.loads(result.stdout)
    assert deaths.pop("uninterrupted") == 0
    assert deaths.pop("again-and-again") == 5
    assert set(deaths.values()) == {1}, "a run was to die and did not"
    expected = remains(tmp_path / "runs" / "uninterrupted")
    assert len(expected["steps"]) == 9
    for name in deaths:
        assert remains(tmp_path / "runs" / name) == expected, name


def remains(out: Path) -> dict[str, object]:
    """All that a run leaves, but for how long its steps took."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe.pop("out")
    return {
        "steps": [line for line in lines if "loss" in line],
        "evals": [line for line in lines if "eval_loss" in line],
        "recipe": recipe,
        "names": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
        "tensors": {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")},
    }


def test_a_fingerprint_tells_models_apart(model, tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        model.save_pretrained(folder)
    weights = folders[1] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    a, b, c = map(model_fingerprint, folders)
    assert a == c != b
    assert model_fingerprint("some/name") == "some/name"
