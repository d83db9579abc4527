"""The smallest whole reproduction; and what a second run of it does."""

import json
from pathlib import Path

import pytest

import obfuscatune
from obfuscatune.cli.app import run as command
from obfuscatune.errors import ConfigError
from obfuscatune.reproduction import presets
from obfuscatune.reproduction.costs import obfuscation_cell
from obfuscatune.reproduction.presets import ShapeDepth
from obfuscatune.reproduction.run import unwatched
from tests.reproduction import made

TASKS = ["sciq", "webqs"]
METHODS = ["plain", "paper", "private", "conditioned(8)"]


class Stopped(Exception):
    """In place of a kill."""


def reproduce(out, tiny, data_root, watch=unwatched, **changed):
    asked = {"preset": "smoke", "parts": ["accuracy", "error", "share"], "tasks": TASKS, "methods": METHODS}
    return obfuscatune.reproduce(out, model=str(tiny), data_root=data_root, watch=watch, **{**asked, **changed})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, data_root):
    """Every part that needs no timing, run once; and what was told while it ran."""
    out, told = tmp_path_factory.mktemp("reproduction") / "out", []

    def watch(what):
        told.append(what)
        return unwatched(what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "smoke", made.preset(tiny / "config.json"))
        found = reproduce(out, tiny, data_root, watch)
    return out, found, told


def test_every_cell_is_done(whole):
    _, found, told = whole
    kinds = [cell.kind for cell in found.cells]
    tuned = 2 * (2 * 3 + 1)  # seeds; two tasks under three methods, one under the ablation
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "accuracy": tuned,
        "rounded": 2 * 4 * 2,  # seeds, methods, 16-bit formats; of one task
        "error": 8 + 4,  # the model under every condition number, and a shape under the methods
        "share": 4,
    }
    assert told[1] == f"[1/{len(kinds)}] sciq plain seed 0: fine-tuning"


def test_private_gives_the_plain_answers(whole):
    _, found, _ = whole
    cells = {
        (c.settings["task"], c.settings["method"], c.settings["seed"]): c for c in found.cells if c.kind == "accuracy"
    }
    for task in TASKS:
        for seed in (0, 1):
            plain, private = (cells[task, method, seed].result for method in ("plain", "private"))
            assert private["losses"] == pytest.approx(plain["losses"], abs=1e-4)
            assert plain["losses"] != cells[task, "plain", 1 - seed].result["losses"], "seeds differ"
    assert all(check.held for check in found.checks if "private" in check.claim)


def test_adapters_are_kept_and_checkpoints_are_not(whole):
    out, *_ = whole
    runs = list((out / "runs").iterdir())
    assert len(runs) == 14
    for run in runs:
        assert (run / "adapter" / "adapter_model.safetensors").is_file()
        assert not (run / "checkpoints").exists()


def test_the_report_is_there_in_every_form(whole):
    out, found, _ = whole
    assert found.report == out / "report.html"
    assert "1. Accuracy, plain and protected" in found.markdown.read_text()
    assert {path.name for path in out.glob("*.csv")} == {
        f"{kind}.csv" for kind in ("accuracy", "rounded", "error", "share")
    }


def test_a_second_run_measures_nothing(whole, tiny, data_root, small_preset):
    out, found, _ = whole
    told = []

    def watch(what):
        told.append(what)
        return unwatched(what)

    again = reproduce(out, tiny, data_root, watch)
    assert told == ["reading models and questions"]
    assert again.cells == found.cells


def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path, tiny, data_root, small_preset):
    def stop_at_the_third(what):
        if what.startswith("[3/"):
            raise Stopped
        return unwatched(what)

    out = tmp_path / "out"
    only = {"parts": ["accuracy"], "tasks": ["webqs"], "methods": ["plain"], "seeds": [0, 1, 2]}
    with pytest.raises(Stopped):
        reproduce(out, tiny, data_root, stop_at_the_third, **only)
    done = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert len(done) == 2
    assert not (out / "report.html").exists()
    found = reproduce(out, tiny, data_root, **only)
    assert len(found.cells) == 3
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}.items()


def test_timing_cells_take_the_presets_shape(tmp_path, tiny, data_root, small_preset, monkeypatch):
    benches = []

    class Timed:
        def __init__(self, bench):
            self.bench = bench

        def as_json(self):
            protected = {"seconds": 2.0, "ratio": 2.0, "ratios": [2.0], "bytes": 1000}
            return {"plain": {"seconds": 1.0}, "protected": {self.bench.profiles[0]: protected}}

    def run(self, progress):
        benches.append(self)
        progress("a line")
        return Timed(self)

    monkeypatch.setattr("obfuscatune.bench.step.StepBench.run", run)
    found = reproduce(tmp_path, tiny, data_root, parts=["slowdown"])
    assert [(bench.shape, *bench.profiles) for bench in benches] == [
        (str(tiny / "config.json"), "paper"),
        (str(tiny / "config.json"), "private"),
    ]
    assert "2.00x" in found.markdown.read_text()


@pytest.mark.parametrize("profile", ["paper", pytest.param("private", marks=pytest.mark.long)])
def test_obfuscation_is_timed_with_the_profiles_own_transform(tiny, profile):
    cell = obfuscation_cell(ShapeDepth(str(tiny / "config.json")), profile)
    result = cell.measure(unwatched)
    assert cell.settings["protection"]["transform"] == {"paper": "haar", "private": "structured"}[profile]
    assert result["seconds"] > 0
    matrices = 12 * 32 * 32 * 4  # bytes of a block's matrices, float32
    assert result["bytes_uploaded"] == {"paper": 2, "private": 1}[profile] * matrices


def test_the_accuracy_part_needs_data(tmp_path):
    with pytest.raises(ConfigError, match="--data-root"):
        obfuscatune.reproduce(tmp_path, preset="smoke", parts=["accuracy"])


def test_the_command_prints_the_tables(tmp_path, capsys):
    arguments = ["reproduce", "--preset", "smoke", "--parts", "share", "--out", str(tmp_path)]
    assert command(arguments) == 0
    shown = capsys.readouterr().out
    assert "| gpt2-xl | 1,557,611,200 | 5.3 % | 7.3 % |" in shown
    assert f"report: {Path(tmp_path) / 'report.html'}" in shown
    assert command([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [cell["name"] for cell in document["cells"]] == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


@pytest.mark.parametrize("option", [("--seeds", "one"), ("--parts", "x"), ("--preset", "x"), ("--tasks", ",")])
def test_wrong_options_are_one_line(tmp_path, capsys, option):
    assert command(["reproduce", "--out", str(tmp_path / "out"), *option]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interruption_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("obfuscatune.reproduction.run.plan_cells", interrupted)
    assert command(["reproduce", "--out", str(tmp_path)]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
