"""The whole demo, from its settings to its result: for each side, ask, fine-tune, ask again."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from obfuscatune.demo.result import DemoRun, Link, Name, Result, Seconds, Shape, check, compare_runs
from obfuscatune.demo.settings import QUESTIONS_AT_ONCE, Settings, held_out
from obfuscatune.enclave.plan import make_plan, model_from_config
from obfuscatune.enclave.profiles import resolve
from obfuscatune.evaluation.questions import evaluate_completions, load_completions
from obfuscatune.evaluation.scoring import Metric
from obfuscatune.report.page import environment
from obfuscatune.training.checkpoint import model_fingerprint
from obfuscatune.training.data_files import Completion
from obfuscatune.training.journal import Event
from obfuscatune.training.recipe import Recipe
from obfuscatune.training.run import finetune, load_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Opened(Protocol):
    """A model that is ready."""

    @property
    def model(self) -> "PreTrainedModel":
        """Protected or plain."""

    def link(self) -> Link | None:
        """What has crossed so far (`ClientStats` by name); None without protection."""


class Screen(Protocol):
    """Whoever watches."""

    def asking(self, name: Name, *, tuned: bool, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """While questions are answered; what it yields is called with the number answered since the last call."""

    def training(self, name: Name) -> AbstractContextManager[Callable[[Event], None]]:
        """While the model is fine-tuned; what it yields is called with each event."""


@dataclass(frozen=True)
class Task:
    """What both sides are given. `fingerprint` tells the model from others."""

    tokenizer: "PreTrainedTokenizerBase"
    questions: Sequence[Completion]
    fingerprint: str


def run_side(
    name: Name, opening: AbstractContextManager[Opened], task: Task, recipe: Recipe, screen: Screen
) -> DemoRun:
    """Open a model, ask, fine-tune it as the recipe says, ask again, close it.

    Raises:
        ObfuscaTuneError: as `open_session`, `evaluate_completions` and `finetune` do.
    """
    began = time.perf_counter()
    with opening as opened:
        ready = time.perf_counter() - began
        data = load_data(recipe, task.tokenizer, opened.model.config)
        before, before_seconds = _ask(name, opened.model, task, screen, tuned=False)
        crossed_before = opened.link()
        with screen.training(name) as see:
            outcome = finetune(opened.model, task.tokenizer, recipe, data, fingerprint=task.fingerprint, report=see)
        crossed_after = opened.link()
        after, after_seconds = _ask(name, outcome.model, task, screen, tuned=True)
    steps = outcome.progress.steps
    training = sum(event.seconds for event in steps)
    link = None
    if crossed_before is not None and crossed_after is not None:
        link = {key: value - crossed_before[key] for key, value in crossed_after.items()}
    seconds = Seconds(ready, before_seconds, training, after_seconds)
    return DemoRun(name, before, after, steps, outcome.adapter, seconds, link)


def _ask(name: Name, model: "PreTrainedModel", task: Task, screen: Screen, *, tuned: bool) -> tuple[Metric, float]:
    began = time.perf_counter()
    with screen.asking(name, tuned=tuned, total=len(task.questions)) as advance:
        metric = evaluate_completions(
            model, task.tokenizer, task.questions, batch_size=QUESTIONS_AT_ONCE, advance=advance
        )
    return metric, time.perf_counter() - began


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

    def run(name: Name) -> DemoRun:
        recipe = settings.recipe(folder / name, plain=name == "plain")
        return run_side(name, opening(name), task, recipe, screen)

    protected, plain = run("protected"), run("plain")
    differences = compare_runs(protected, plain)
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
