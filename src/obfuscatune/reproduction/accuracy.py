"""A model tuned on a task and asked its questions; and a tuned model asked again in 16 bits.

The questions of the test set are asked as lm-evaluation-harness asks them. So are some of those that it was trained on:
a small model shows there what it has learnt long before it knows anything about questions that are new to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from obfuscatune.evaluation.questions import evaluate_task
from obfuscatune.evaluation.scoring import Metric
from obfuscatune.reproduction.cells import Cell, Meter, Watch
from obfuscatune.reproduction.opening import Opening, Subject
from obfuscatune.reproduction.presets import Method, Preset, find_method
from obfuscatune.training.adapter import load_adapter
from obfuscatune.training.data import Data, Dataset
from obfuscatune.training.journal import Event, Started
from obfuscatune.training.loop import StepEvent
from obfuscatune.training.recipe import Recipe
from obfuscatune.training.run import Outcome, finetune, load_data
from obfuscatune.training.storage import RunDirectory
from obfuscatune.training.tasks import Question, Task, find_task, load_questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUNS = "runs"
_QUESTIONS_AT_ONCE = 16
_CHECKPOINT_EVERY = 200


@dataclass(frozen=True)
class Study:
    """What all accuracy cells share: the model, the questions, how much is done, and where runs lie."""

    subject: Subject
    opening: Opening
    data: Path
    preset: Preset
    out: RunDirectory
    _read: dict[str, Data] = field(default_factory=dict, repr=False)
    """By task: reading and tokenising takes longer than a small model takes to learn it."""

    def tuned(self, task: str, method: str, seed: int) -> Cell:
        """Fine-tune in float32, then ask."""
        recipe = self._recipe(task, method, seed)
        data = self._data(task, recipe)
        settings = {
            **self._asked(task),
            **recipe.model_dump(mode="json", exclude={"model", "data", "eval", "out", "worker", "checkpoint_every"}),
            "method": method,
            "protection": find_method(method).resolved,
            "records": len(data.train.examples),
            "heldout": 0 if data.eval is None else len(data.eval.examples),
            "train_data": data.train.digest,
        }

        def measure(watch: Watch) -> Mapping[str, Any]:
            return self._tune(find_method(method), find_task(task), recipe, data, watch)

        return Cell("accuracy", f"{task} {method} seed {seed}", settings, measure)

    def untuned(self, task: str, method: str) -> Cell:
        """Ask in float32 before anything was tuned."""
        settings = {
            **self._asked(task),
            "method": method,
            "protection": find_method(method).resolved,
            "dtype": "float32",
        }

        def measure(watch: Watch) -> Mapping[str, Any]:
            with self.opening.model(self.subject.directory, find_method(method), torch.float32) as model:
                return self._ask(model, find_task(task), f"{task} {method} untuned: asking", watch)

        return Cell("untuned", f"{task} {method}", settings, measure)

    def rounded(self, tuned: Cell, method: str, dtype: str) -> Cell:
        """Ask the model that another cell has tuned, protected otherwise and in another number format."""
        settings = {"tuned": tuned.key, "method": method, "protection": find_method(method).resolved, "dtype": dtype}
        settings |= {name: tuned.settings[name] for name in ("task", "seed", "questions", "recalled")}

        def measure(watch: Watch) -> Mapping[str, Any]:
            return self._ask_again(find_method(method), tuned, dtype, watch)

        name = f"{tuned.settings['task']} {method} {dtype} seed {tuned.settings['seed']}"
        return Cell("rounded", name, settings, measure)

    def run_of(self, cell: Cell) -> Path:
        """The run directory of a tuned cell."""
        return self.out.root / RUNS / cell.key

    def _recipe(self, task: str, method: str, seed: int) -> Recipe:
        profile = find_method(method).profile
        return Recipe(
            data=self.data,
            eval=self.data,
            task=task,
            plain=profile is None,
            profile=profile or "private",
            seed=seed,
            lr=self.preset.lr,
            schedule=self.preset.schedule,  # type: ignore[arg-type]  # checked by the recipe
            batch_size=self.preset.batch_size,
            epochs=self.preset.epochs,
            too_long="drop",
            checkpoint_every=_CHECKPOINT_EVERY,
        )

    def _data(self, task: str, recipe: Recipe) -> Data:
        """The task's examples, as many as the preset says: the same for every method and seed."""
        if task not in self._read:
            data = load_data(recipe, self.subject.tokenizer, self.subject.config)
            heldout = None if data.eval is None else _first(data.eval, self.preset.heldout)
            self._read[task] = Data(_first(data.train, self.preset.records), heldout)
        return self._read[task]

    def _asked(self, task: str) -> dict[str, Any]:
        questions = load_questions(find_task(task), self.data, self.preset.questions)
        return {
            "task": task,
            "model": self.subject.fingerprint,
            "questions": len(questions),
            "recalled": min(self.preset.recalled, self.preset.records or self.preset.recalled),
        }

    def _tune(self, method: Method, task: Task, recipe: Recipe, data: Data, watch: Watch) -> Mapping[str, Any]:
        cell = self.tuned(task.name, method.name, recipe.seed)
        recipe = recipe.model_copy(update={"out": self.run_of(cell)})
        with self.opening.model(self.subject.directory, method, torch.float32) as model:
            with watch(f"{cell.name}: fine-tuning") as meter:
                outcome = finetune(
                    model,
                    self.subject.tokenizer,
                    recipe,
                    data,
                    fingerprint=self.subject.fingerprint,
                    report=_shown(meter),
                    resume_run=True,
                )
            asked = self._ask(outcome.model, task, f"{cell.name}: asking", watch)
        RunDirectory(recipe.out).remove_directory("checkpoints")
        return {**_losses(outcome, recipe.epochs), **asked}

    def _ask_again(self, method: Method, tuned: Cell, dtype: str, watch: Watch) -> Mapping[str, Any]:
        task = find_task(tuned.settings["task"])
        with self.opening.model(self.subject.directory, method, getattr(torch, dtype)) as model:
            answering = load_adapter(model, self.run_of(tuned) / "adapter")
            return self._ask(answering, task, f"{task.name} {method.name} {dtype}: asking", watch)

    def _ask(self, model: PreTrainedModel, task: Task, what: str, watch: Watch) -> dict[str, Any]:
        test = load_questions(task, self.data, self.preset.questions)
        known = _training_questions(task, self.data, min(self.preset.recalled, self.preset.records or len(test)))
        with watch(what) as meter:
            meter.expect(sum(len(question.choices) for question in (*test, *known)))

            def ask(questions: Sequence[Question]) -> dict[str, Any]:
                metrics = evaluate_task(
                    model,
                    self.subject.tokenizer,
                    task,
                    questions,
                    batch_size=_QUESTIONS_AT_ONCE,
                    advance=meter.advance,
                )
                return {metric.name: _in_json(metric) for metric in metrics}

            return {"test": ask(test), "recall": ask(known)}


def headline(task: str) -> str:
    """The metric that stands in the tables."""
    return "exact_match" if find_task(task).metric == "greedy" else "acc"


def metric_of(result: Mapping[str, Any], which: str, name: str) -> Metric:
    """A metric as `_ask` left it."""
    from obfuscatune.evaluation.scoring import Verdict

    return Metric(name, tuple(Verdict(*verdict) for verdict in result[which][name]["verdicts"]))


def _in_json(metric: Metric) -> dict[str, Any]:
    verdicts = [(it.answer, it.right, round(it.margin, 6)) for it in metric.verdicts]
    return {"value": metric.value, "stderr": metric.stderr, "verdicts": verdicts}


def _first(dataset: Dataset, count: int | None) -> Dataset:
    """The first examples, under a digest of their own."""
    if count is None or count >= len(dataset.examples):
        return dataset
    return replace(dataset, examples=dataset.examples[:count], digest=f"{dataset.digest} first {count}")


def _training_questions(task: Task, data: Path, count: int) -> list[Question]:
    return [task.read(line) for line in islice(task.lines(data, task.train), count)]


def _losses(outcome: Outcome, epochs: int) -> dict[str, Any]:
    """Nats per token: of the first step, over the whole last epoch, and on the held-out records before and after."""
    steps = outcome.progress.steps
    last_epoch = [event.loss for event in steps if event.epoch == epochs]
    evals = outcome.progress.evals
    return {
        "first_loss": steps[0].loss,
        "final_loss": fmean(last_epoch),
        "heldout_before": evals[0][1],
        "heldout_after": evals[-1][1],
        "losses": [event.loss for event in steps],
        "tuning_seconds": sum(event.seconds for event in steps),
    }


def _shown(meter: Meter) -> Callable[[Event], None]:
    def see(event: Event) -> None:
        match event:
            case Started(first_step=done, total_steps=total):
                meter.expect(total)
                meter.advance(done)
            case StepEvent(loss=loss):
                meter.advance(1, f"loss {loss:.4f}")

    return see
