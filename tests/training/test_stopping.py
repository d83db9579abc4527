"""Early stopping, the best checkpoint, a run that is asked to stop, and one that is made longer: each exactly."""

import copy
import json
import os

import pytest
import torch
import yaml
from safetensors.torch import load_file

from obfuscatune.errors import ConfigError, RunStopped
from obfuscatune.training.adapter import load_adapter
from obfuscatune.training.checkpoint import Progress
from obfuscatune.training.journal import Measured, Started
from obfuscatune.training.loop import StepEvent
from obfuscatune.training.recipe import Recipe
from obfuscatune.training.run import finetune, load_data

RECORDS = [{"prompt": f"{i} plus one is", "completion": f" {i + 1}"} for i in range(10)]
HELD_OUT = [{"prompt": "A is", "completion": " Zqx"}, {"prompt": "B is", "completion": " #@!"}]
SETTINGS = {"plain": True, "lora_r": 2, "lora_dropout": 0.2, "batch_size": 4, "lr": 0.03, "epochs": 6}
"""Three steps an epoch."""


@pytest.fixture
def run(model, tokenizer, jsonl, tmp_path):
    """Runs a recipe on a fresh copy of the model; returns the outcome and all events."""
    files = {"data": jsonl(*RECORDS), "eval": jsonl(*HELD_OUT)}

    def start(name="out", *, resume=False, stop_asked=lambda: False, seen=None, **fields):
        recipe = Recipe(**files | SETTINGS | {"out": tmp_path / name} | fields)
        own = copy.deepcopy(model)
        events = [] if seen is None else seen
        outcome = finetune(
            own,
            tokenizer,
            recipe,
            load_data(recipe, tokenizer, own.config),
            fingerprint="m",
            report=events.append,
            resume_run=resume,
            stop_asked=stop_asked,
        )
        return outcome, events

    return start


def stop_after(events, step):
    """Asks to stop once that step is taken."""

    def asked():
        return any(isinstance(event, StepEvent) and event.step == step for event in events)

    return asked


def left(out):
    """All that a run leaves but its timings and its own name."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe.pop("out")
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if "tfevents" not in path.name)
    return lines, recipe, names, {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")}


def measured(outcome):
    return dict(outcome.progress.evals)


def test_training_stops_when_patience_is_over(run, tmp_path):
    whole, _ = run("whole", eval_every=1)
    losses = measured(whole)
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert best + 2 < 18, "the held-out records are no use for this test: they are learnt to the end"
    stopped, _ = run("stopped", eval_every=1, patience=2)
    assert stopped.progress.step == best + 2
    assert stopped.progress.evals == whole.progress.evals[: best + 3]
    folders = sorted(os.listdir(tmp_path / "stopped" / "checkpoints"))
    assert folders == [f"step-{step:06d}" for step in (best, best + 2)]


def test_a_run_that_stopped_early_stays_so_until_patience_is_raised(run):
    first, _ = run(eval_every=1, patience=2)
    again, events = run(eval_every=1, patience=2, resume=True)
    assert [type(event) for event in events] == [Started]
    assert again.progress == first.progress
    longer, _ = run(eval_every=1, patience=4, resume=True)
    assert longer.progress.step == first.progress.step + 2


def test_patience_counts_from_the_best_and_leaves_out_what_was_before_training():
    assert not Progress((), ((0, 1.0),)).is_stopped(1)
    rising = Progress((), ((0, 1.0), (1, 3.0), (2, 2.0), (3, 2.0), (4, 2.5)))
    assert rising.best == (2, 2.0)
    assert rising.is_stopped(2)
    assert not rising.is_stopped(3)
    assert Progress((), ((1, float("nan")), (2, 5.0))).best == (2, 5.0)


def test_the_adapter_is_of_the_best_checkpoint(run, model, tmp_path):
    outcome, _ = run(eval_every=1, load_best=True, checkpoints_kept=1)
    best, loss = outcome.progress.best
    assert best < 18
    out = tmp_path / "out"
    assert sorted(os.listdir(out / "checkpoints")) == [f"step-{best:06d}", "step-000018"]
    kept = load_file(out / "checkpoints" / f"step-{best:06d}" / "adapter_model.safetensors")
    made = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in made.items())
    assert json.loads((out / "run.json").read_text())["best_eval"] == {"step": best, "loss": loss}
    ids = torch.arange(8)[None]
    assert torch.equal(load_adapter(model, out / "adapter")(ids).logits, outcome.model(ids).logits)


def test_the_best_cannot_be_loaded_where_it_was_not_kept(run):
    run(eval_every=1, checkpoints_kept=1)
    with pytest.raises(ConfigError, match=r"load_best: the checkpoint of step \d+, the best so far, was not kept"):
        run(eval_every=1, load_best=True, resume=True)


@pytest.mark.parametrize("kept", [1, 3])
def test_only_so_many_checkpoints_are_kept(run, tmp_path, kept):
    run(checkpoint_every=2, checkpoints_kept=kept)
    expected = [f"step-{step:06d}" for step in range(2, 20, 2)][-kept:]
    assert sorted(os.listdir(tmp_path / "out" / "checkpoints")) == expected


def test_measurements_and_checkpoints_may_come_once_an_epoch(run, tmp_path):
    outcome, _ = run(eval_every="epoch", checkpoint_every="epoch", epochs=2, checkpoints_kept=9)
    assert [step for step, _ in outcome.progress.evals] == [0, 3, 6]
    assert sorted(os.listdir(tmp_path / "out" / "checkpoints")) == ["step-000003", "step-000006"]


def test_warmup_may_be_a_share_of_all_steps(run):
    _, by_share = run("share", warmup_ratio=0.3, lora_dropout=0.0)
    _, by_steps = run("steps", warmup_steps=6, lora_dropout=0.0)  # 0.3 of 18, rounded up
    rates = [[event.lr for event in events if isinstance(event, StepEvent)] for events in (by_share, by_steps)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("step", [1, 4, 17])
def test_a_run_that_is_asked_to_stop_goes_on_exactly(run, tmp_path, step):
    pytest.importorskip("tensorboard")
    settings = {"eval_every": 2, "load_best": True, "patience": 9, "tensorboard": True, "checkpoint_every": 5}
    run("whole", **settings)
    events = []
    with pytest.raises(RunStopped, match=f"stopped after step {step} of 18: a checkpoint is written"):
        run("stopped", seen=events, stop_asked=stop_after(events, step), **settings)
    assert f"step-{step:06d}" in os.listdir(tmp_path / "stopped" / "checkpoints")
    assert not (tmp_path / "stopped" / "run.json").exists()
    run("stopped", resume=True, **settings)
    whole, stopped = left(tmp_path / "whole"), left(tmp_path / "stopped")
    assert stopped[:2] == whole[:2]
    assert stopped[3]["adapter/adapter_model.safetensors"] == whole[3]["adapter/adapter_model.safetensors"]
    assert points(tmp_path / "stopped") == points(tmp_path / "whole")


def test_a_measurement_that_is_broken_off_is_made_when_the_run_goes_on(run, tmp_path):
    run("whole", eval_every=2)
    events = []
    with pytest.raises(RunStopped):
        run("stopped", seen=events, stop_asked=stop_after(events, 4), eval_every=2)
    assert not any(isinstance(event, Measured) and event.step == 4 for event in events)
    run("stopped", resume=True, eval_every=2)
    assert left(tmp_path / "stopped")[0] == left(tmp_path / "whole")[0]


def test_a_stop_before_the_first_step_leaves_no_checkpoint(run, tmp_path):
    with pytest.raises(RunStopped, match="stopped after step 0 of 18: there is nothing to save yet"):
        run(stop_asked=lambda: True)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_finished_run_is_extended(run, tmp_path):
    first, _ = run(epochs=3)
    extended, events = run(epochs=5, resume=True)
    started = events[0]
    assert (started.first_step, started.total_steps, started.planned_before) == (9, 15, 9)
    assert extended.progress.steps[:9] == first.progress.steps
    # Linear: each step's rate is that of its place in the run as it was planned when the step was taken.
    rates = [event.lr for event in extended.progress.steps]
    assert rates == pytest.approx([0.03 * (1 - s / 9) for s in range(9)] + [0.03 * (1 - s / 15) for s in range(9, 15)])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps"] == 15
    with pytest.raises(ConfigError, match="epochs was 5 and is 3"):
        run(epochs=3, resume=True)


def test_a_longer_run_of_constant_rate_is_one_that_was_long_from_the_start(run, tmp_path):
    settings = {"schedule": "constant", "eval_every": 3, "checkpoint_every": 3}
    run("whole", epochs=5, **settings)
    run("extended", epochs=3, **settings)
    run("extended", epochs=5, resume=True, **settings)
    assert left(tmp_path / "extended") == left(tmp_path / "whole")


def test_max_steps_are_extended_by_max_steps(run):
    run(max_steps=4)
    assert run(max_steps=7, resume=True)[0].progress.step == 7
    with pytest.raises(ConfigError, match="max_steps was 7 and is None"):
        run(resume=True)


def points(out):
    """What the event files hold, without their times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    return {tag: [(it.step, it.value) for it in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_shows_what_metrics_says(run, tmp_path):
    pytest.importorskip("tensorboard")
    outcome, _ = run(tensorboard=True, logging_steps=6, eval_every=9)
    shown = points(tmp_path / "out")
    steps = outcome.progress.steps
    assert [step for step, _ in shown["train/loss"]] == [6, 12, 18]
    assert shown["train/loss"][0][1] == pytest.approx(sum(event.loss for event in steps[:6]) / 6, rel=1e-6)
    assert shown["train/learning_rate"][-1][1] == pytest.approx(steps[-1].lr, rel=1e-6)
    assert shown["eval/loss"] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in outcome.progress.evals]


def test_without_tensorboard_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"run: pip install 'obfuscatune\[tensorboard\]'"):
        run(tensorboard=True)
