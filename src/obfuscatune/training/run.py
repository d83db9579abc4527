"""One run from its recipe to its adapter, resumable whenever it ends.

<out>/recipe.yaml     the resolved recipe
<out>/metrics.jsonl   a line for every step and every measurement on the eval records
<out>/checkpoints/    the newest, and the best (checkpoint.py)
<out>/tensorboard/    the same as metrics.jsonl, where asked for (journal.py)
<out>/adapter/        the result, in PEFT's format
<out>/run.json        what came out, once the run is complete
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obfuscatune.errors import ConfigError, ModelFileError, RunStopped, StorageError
from obfuscatune.training.adapter import adapter_files, add_lora
from obfuscatune.training.checkpoint import Progress, ingredients, load_best, refuse_other_run, resume, save_checkpoint
from obfuscatune.training.data import Data, Dataset, Source, load_dataset
from obfuscatune.training.journal import Event, Journal, Started, also_on_board
from obfuscatune.training.loop import Cadence, make_optimizer, mean_loss, train
from obfuscatune.training.recipe import Recipe
from obfuscatune.training.storage import RunDirectory
from obfuscatune.training.tokens import check_ids, context_window, embedding_rows, end_id

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_plain(directory: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Read a model as it is, all of it in this process. `config`: of the directory, as `read_config` gives it.

    Raises:
        ModelFileError: the directory cannot be read as a model in safetensors.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelFileError(f"{directory} cannot be read as a model in safetensors: {error}") from error
    return model


@dataclass(frozen=True)
class Outcome:
    """A complete run. `model` is the wrapped model, ready to answer; `adapter` its directory.

    `best_step` is the step whose factors both have, where these are not the last one's; `stopped_early` says whether
    patience ended the run before its last step.
    """

    model: PeftModel
    progress: Progress
    adapter: Path
    best_step: int | None = None
    stopped_early: bool = False


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any) -> Data:
    """Read a recipe's records; it needs no more of the model than its configuration.

    Raises:
        ConfigError: a length beyond the model's window, or no such task.
        DataError: the records cannot be used.
    """
    longest = longest_example(recipe, config)
    check_ids(tokenizer, [end_id(tokenizer)], embedding_rows(config))

    def load(source: Source) -> Dataset:
        return load_dataset(
            source,
            tokenizer,
            longest,
            recipe.too_long,
            split=recipe.split_turns,
            vocabulary=embedding_rows(config),
        )

    train_source, eval_source = sources(recipe)
    return Data(load(train_source), None if eval_source is None else load(eval_source))


def longest_example(recipe: Recipe, config: Any) -> int:
    """The most tokens that an example may have.

    Raises:
        ConfigError: the recipe asks for more than the model's window.
    """
    window = context_window(config)
    if recipe.max_length is not None and recipe.max_length > window:
        raise ConfigError(f"--max-length: {recipe.max_length} tokens, and the model's window is {window}")
    return recipe.max_length or window


def sources(recipe: Recipe) -> tuple[Source, Source | None]:
    """Where a recipe's records are: those to train on, and those to measure on, if any.

    Raises:
        ConfigError, DataError: as `Source.of`.
    """
    train = Source.of(recipe.data, recipe.task, "train", recipe.fields)
    return train, None if recipe.eval is None else Source.of(recipe.eval, recipe.task, "test", recipe.fields)


def check_out(recipe: Recipe, data: Data, *, fingerprint: str, resume_run: bool) -> None:
    """Refuse a run directory that `finetune` would refuse, before a model is loaded for it.

    Args:
        data, fingerprint, resume_run: As for `finetune`.

    Raises:
        ConfigError: it holds a run that is not to be resumed, or another one than this.
        ModelFileError: the provider's adapter cannot be read.
        StorageError: it is no directory, or its newest checkpoint is damaged.
    """
    if recipe.out.exists():
        directory = RunDirectory(recipe.out)
        _refuse_accident(directory, resume_run)
        made_of = _made_of(recipe, data, fingerprint, _provider_digest(recipe))
        refuse_other_run(directory, made_of, load_best=recipe.load_best)


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    data: Data,
    *,
    fingerprint: str,
    report: Callable[[Event], None],
    resume_run: bool = False,
    stop_asked: Callable[[], bool] = lambda: False,
    directory: RunDirectory | None = None,
) -> Outcome:
    """Fine-tune a model, protected or plain, as the recipe says, and write the run directory.

    Args:
        model: A Hugging Face causal language model, with the provider's adapter if the recipe names one
            (`load_provider_adapter`); it is wrapped in place.
        data: What `load_data` read.
        fingerprint: What tells this model from others (`checkpoint.model_fingerprint`).
        report: Called with each event as it happens.
        resume_run: Go on from the newest checkpoint in `recipe.out`; without one, begin. With more epochs or steps
            than the run had, it becomes longer: the learning rate then follows the schedule of the longer run from
            the next step on.
        stop_asked: Asked after each step, and while measuring: whether to end early.
        directory: What writes `recipe.out`, where that is not in clear.

    Raises:
        ConfigError: the recipe does not fit the model; `out` holds a run that is not to be resumed, or
            another one than this; TensorBoard is asked for and not installed.
        NonFiniteError: a loss or gradient is NaN or infinite.
        RunStopped: `stop_asked` said so; a checkpoint is written, and to resume from it is never to have stopped.
        StorageError: the disk refused, or a checkpoint is damaged.
    """
    from obfuscatune.training.provider_adapter import provider_summary

    provider, digest = provider_summary(model), _provider_digest(recipe)
    if digest != (None if provider is None else provider["sha256"]):
        raise ConfigError(
            "the model has another provider's adapter than the recipe names, or one of them has none: name it in the "
            "recipe (provider_adapter), and put it on the model by load_provider_adapter"
        )
    cadence = Cadence.of(recipe, len(data.train.examples))
    made_of = _made_of(recipe, data, fingerprint, digest)
    directory = directory or RunDirectory(recipe.out)
    with directory.locked(), ExitStack() as stack:
        _refuse_accident(directory, resume_run)
        directory.clean()
        before = refuse_other_run(directory, made_of, load_best=recipe.load_best)
        peft_model = add_lora_as_recipe(model, recipe)
        if recipe.gradient_checkpointing:
            _enable_gradient_checkpointing(model)
        optimizer = make_optimizer(peft_model, weight_decay=recipe.weight_decay)
        progress = resume(directory, peft_model, optimizer, made_of)
        directory.write_file("recipe.yaml", recipe.to_yaml().encode())
        if recipe.tensorboard:
            report = stack.enter_context(also_on_board(report, directory, progress, recipe.logging_steps))
        journal = Journal(directory, progress, report)
        account = MaskAccount.of(model, directory)
        report(Started(progress.step, cadence.total_steps, data, cadence.planned_before(before)))
        course = _Course(
            *(recipe, cadence, data, directory, peft_model, optimizer, journal, made_of, progress),
            pad_id=end_id(tokenizer),
            stop_asked=stop_asked,
        )
        complete = course.settle()
        if not complete:
            directory.remove_file("run.json")  # of the shorter run that this one goes on from
        steps = train(
            *(peft_model, optimizer, data.train.examples, cadence.plan, cadence.optimizer_settings),
            pad_id=course.pad_id,
            first_step=progress.step,
        )
        while not complete:
            journal.stepped(next(steps))
            complete = course.settle()

        stopped_early = journal.progress.step < cadence.total_steps
        best_step = load_best(directory, peft_model, journal.progress) if recipe.load_best else None
        directory.write_directory("adapter", adapter_files(peft_model))
        account.close()
        made = summary(journal.progress) | account.as_json() | ({} if provider is None else {PROVIDER_KEY: provider})
        directory.write_file("run.json", json.dumps(made, indent=2).encode() + b"\n")
    return Outcome(peft_model.eval(), journal.progress, recipe.out / "adapter", best_step, stopped_early)


@dataclass
class _Course:
    """A run on its way: after each step it measures and saves what is due, and knows when it is over."""

    recipe: Recipe
    cadence: Cadence
    data: Data
    directory: RunDirectory
    peft_model: PeftModel
    optimizer: torch.optim.Optimizer
    journal: Journal
    made_of: Mapping[str, Any]
    saved: Progress
    """As far as the newest checkpoint goes."""
    pad_id: int
    stop_asked: Callable[[], bool]

    def settle(self) -> bool:
        """Do what is due after the steps so far. Whether the run is complete.

        Raises:
            RunStopped: it was asked to end early, and what it did is saved.
        """
        self._measure()
        now = self.journal.progress
        complete = now.step == self.cadence.total_steps or now.is_stopped(self.recipe.patience)
        stopping = not complete and self.stop_asked()
        is_best = self.recipe.keeps_best and now.best is not None and now.best[0] == now.step
        if complete or stopping or is_best or self.cadence.saves_at(now.step):
            self._save(now)
        if stopping:
            written = "a checkpoint is written" if now.step else "there is nothing to save yet"
            raise RunStopped(f"stopped after step {now.step} of {self.cadence.total_steps}: {written}")
        return complete

    def _measure(self) -> None:
        """Measure, if it is due; a measurement that is broken off is made when the run goes on."""
        now = self.journal.progress
        if self.data.eval is None or now.is_measured or not self.cadence.measures_at(now.step):
            return
        with suppress(_StopAskedError):
            loss = mean_loss(
                self.peft_model,
                self.data.eval.examples,
                batch_size=self.recipe.batch_size,
                pad_id=self.pad_id,
                before_batch=partial(_raise_if, self.stop_asked),
            )
            self.journal.measured(loss)

    def _save(self, now: Progress) -> None:
        if not now.step or now == self.saved:
            return
        save_checkpoint(
            *(self.directory, self.peft_model, self.optimizer, now, self.made_of),
            kept=self.recipe.checkpoints_kept,
            keep_best=self.recipe.keeps_best,
        )
        self.saved = now


def summary(progress: Progress) -> dict[str, object]:
    """A complete run in numbers: losses in nats per token, seconds of all its steps, trained tokens."""
    best = progress.best
    return {
        "steps": progress.step,
        "first_loss": progress.steps[0].loss,
        "last_loss": progress.steps[-1].loss,
        "eval_losses": [{"step": step, "loss": loss} for step, loss in progress.evals],
        "best_eval": None if best is None else {"step": best[0], "loss": best[1]},
        "tokens": sum(event.tokens for event in progress.steps),
        "seconds": sum(event.seconds for event in progress.steps),
    }


@dataclass(frozen=True)
class MaskAccount:
    """What a run has sent under masks, in its directory as `masks.json`: a run that is resumed goes on counting."""

    masks: Any
    """Of the model (`enclave/masks.py`); None where it has none."""
    directory: RunDirectory

    @classmethod
    def of(cls, model: PreTrainedModel, directory: RunDirectory) -> MaskAccount:
        """That of a run; what it had spent before counts.

        Raises:
            StorageError: the file is damaged: what was spent is not known.
        """
        masks = getattr(getattr(model, "protection", None), "masks", None)
        path = directory.root / MASKS_FILE
        if masks is not None and path.exists():
            content = directory.read(MASKS_FILE)
            try:
                spent = json.loads(content)
                masks.accountant.carry(int(spent["rows"]), float(spent["mu"]))
            except (ValueError, KeyError, TypeError) as error:
                raise StorageError(f"{path} cannot be read, and has what the run had shown so far: {error}") from error
        account = cls(masks, directory)
        if masks is not None:
            masks.accountant.keep_by(account.keep)
        return account

    def keep(self, rows: int, mu: float) -> None:
        """Write down what is about to be spent, before it is."""
        self.directory.write_file(MASKS_FILE, json.dumps({"rows": rows, "mu": mu}).encode() + b"\n")

    def close(self) -> None:
        """Write what was spent in the end; what is sent later is another's to count."""
        if self.masks is not None:
            spent = self.masks.accountant.spent
            self.masks.accountant.keep_by(self.keep)
            self.keep(spent.rows, spent.mu)

    def as_json(self) -> dict[str, Any]:
        """For `run.json`; nothing without masks."""
        return {} if self.masks is None else {"masks": self.masks.account()}


MASKS_FILE = "masks.json"
PROVIDER_KEY = "provider_adapter"
"""In `run.json`: digest and number of parameters of the provider's adapter that the run stands on."""


class _StopAskedError(Exception):
    """Ends a measurement."""


def _raise_if(asked: Callable[[], bool]) -> None:
    if asked():
        raise _StopAskedError


def _provider_digest(recipe: Recipe) -> str | None:
    from obfuscatune.training.provider_adapter import adapter_digest

    return None if recipe.provider_adapter is None else adapter_digest(recipe.provider_adapter)


def _made_of(recipe: Recipe, data: Data, fingerprint: str, provider: str | None) -> Mapping[str, Any]:
    evaluation = None if data.eval is None else data.eval.digest
    return ingredients(recipe, model=fingerprint, data=data.train.digest, evaluation=evaluation, provider=provider)


def add_lora_as_recipe(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """`add_lora` with the settings of a recipe.

    Raises:
        ConfigError: as `add_lora`.
    """
    return add_lora(
        model,
        r=recipe.lora_r,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
        targets=recipe.lora_targets,
        seed=recipe.seed,
    )


def _enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Non-reentrant: the reentrant way needs inputs with a gradient, and the embeddings are frozen."""
    # Later versions of transformers 5 call it by the first name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _refuse_accident(directory: RunDirectory, resume_run: bool) -> None:
    if not resume_run and (directory.root / "recipe.yaml").exists():
        raise ConfigError(f"{directory.root}: holds a run; go on with it by --resume, or choose another --out")
