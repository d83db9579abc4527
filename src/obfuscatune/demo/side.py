"""One side of the demo, protected or plain: ask, fine-tune, ask again."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from obfuscatune.demo.settings import QUESTIONS_AT_ONCE
from obfuscatune.evaluation.questions import evaluate_completions
from obfuscatune.evaluation.scoring import Metric
from obfuscatune.tuning.journal import Event
from obfuscatune.tuning.loop import StepEvent
from obfuscatune.tuning.recipe import Recipe
from obfuscatune.tuning.records import Completion
from obfuscatune.tuning.run import finetune, load_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Name = Literal["protected", "plain"]
Link = Mapping[str, int | float]


class Opened(Protocol):
    """A model that is ready."""

    @property
    def model(self) -> "PreTrainedModel":
        """Protected or plain."""

    def link(self) -> Link | None:
        """What has crossed so far (`LinkStats` by name); None without protection."""


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


@dataclass(frozen=True)
class Seconds:
    """Wall time: to make the model ready (a worker's start included), to answer, to train."""

    ready: float
    before: float
    training: float
    after: float


@dataclass(frozen=True)
class Side:
    """What came of one side. `link` counts what crossed while training, None without protection."""

    name: Name
    before: Metric
    after: Metric
    steps: tuple[StepEvent, ...]
    adapter: Path
    seconds: Seconds
    link: Link | None

    @property
    def losses(self) -> tuple[float, ...]:
        """Of every step, in nats per token."""
        return tuple(event.loss for event in self.steps)


def run_side(name: Name, opening: AbstractContextManager[Opened], task: Task, recipe: Recipe, screen: Screen) -> Side:
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
    return Side(name, before, after, steps, outcome.adapter, seconds, link)


def _ask(name: Name, model: "PreTrainedModel", task: Task, screen: Screen, *, tuned: bool) -> tuple[Metric, float]:
    began = time.perf_counter()
    with screen.asking(name, tuned=tuned, total=len(task.questions)) as advance:
        metric = evaluate_completions(
            model, task.tokenizer, task.questions, batch_size=QUESTIONS_AT_ONCE, advance=advance
        )
    return metric, time.perf_counter() - began
