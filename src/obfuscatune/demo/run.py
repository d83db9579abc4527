"""The whole demo, from its settings to its result."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from obfuscatune.demo.result import Result, Shape, check, compare_sides
from obfuscatune.demo.settings import Settings, held_out
from obfuscatune.demo.side import Name, Opened, Screen, Side, Task, run_side
from obfuscatune.enclave.plan import make_plan, model_from_config
from obfuscatune.enclave.profiles import resolve
from obfuscatune.evaluation.questions import load_completions
from obfuscatune.report.environment import environment
from obfuscatune.tuning.identity import model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_demo(
    settings: Settings,
    folder: Path,
    model: Path,
    tokenizer: "PreTrainedTokenizerBase",
    opening: Callable[[Name], AbstractContextManager[Opened]],
    screen: Screen,
) -> Result:
    """Run the protected side, then the plain one, and compare them.

    One after the other, and the worker gone before the plain side begins: neither takes time from the other.

    Args:
        folder: where each side writes its run, under its name.
        model: the directory of the model.
        opening: makes a side's model ready, and puts it away when its `with` ends.

    Raises:
        ObfuscaTuneError: as `run_side` does.
    """
    began = time.perf_counter()
    task = Task(tokenizer, load_completions(held_out(), settings.questions), model_fingerprint(model))

    def run(name: Name) -> Side:
        recipe = settings.recipe(folder / name, plain=name == "plain")
        return run_side(name, opening(name), task, recipe, screen)

    protected, plain = run("protected"), run("plain")
    differences = compare_sides(protected, plain)
    counted = make_plan(model_from_config(model), resolve(settings.recipe(folder, plain=False).profile))
    return Result(
        settings,
        Shape(counted.parameters, counted.enclave_parameters),
        protected,
        plain,
        differences,
        check(settings, protected, plain, differences),
        task.questions,
        environment(),
        time.perf_counter() - began,
    )
