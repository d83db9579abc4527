"""Checkpoints: the state after a step, in a directory that is whole or absent.

    checkpoints/step-000050/
        adapter_model.safetensors   the factors, with adapter_config.json PEFT's own format
        adapter_config.json
        optimizer.safetensors       AdamW's moments, `<parameter name>/<moment>`
        state.json                  step, losses so far, what the run is made of, SHA-256 of the other files

The learning rate, the order of the data and the dropout's seeds are functions of the step (loop.py), so no scheduler
and no random state need be kept. Nothing is ever unpickled: a disk may be in other hands.

A run is resumed only if what it is made of is the same: recipe, data, model.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from obfuscatune.errors import ConfigError, ModelFileError, StorageError
from obfuscatune.training.adapter import WEIGHTS, RemotelyOptimized, adapter_files, set_adapter_weights
from obfuscatune.training.loop import StepEvent
from obfuscatune.training.recipe import Recipe
from obfuscatune.training.storage import RunDirectory

if TYPE_CHECKING:
    from peft import PeftModel


_SAMPLE_BYTES = 64 * 2**10

_NOT_INGREDIENTS = {
    *("model", "provider_adapter", "data", "eval", "out", "worker", "fleet", "base", "public_base"),
    *("mask_worker", "mask_memory", "mask_budget"),
    *("checkpoint_every", "checkpoints_kept", "tensorboard", "logging_steps"),
    *("patience", "load_best"),
}
"""Fields that may change: where things lie (contents are compared); what leaves no trace in the result; what is
decided anew after each step, or at the end, from the losses so far."""
_LENGTH = {"epochs", "max_steps"}


def ingredients(
    recipe: Recipe, *, model: str, data: str, evaluation: str | None, provider: str | None = None
) -> Mapping[str, Any]:
    """The recipe's fields that shape the result, and the digests of model, data, eval records, provider's adapter."""
    fields = recipe.model_dump(mode="json", exclude=_NOT_INGREDIENTS)
    return fields | {"model": model, "data": data, "eval": evaluation, "provider_adapter": provider}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The ingredients in which a run differs from a checkpoint's. To be longer is no difference."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if _LENGTH.issuperset(keys) and _is_longer(before, now):
        return []
    return keys


def _is_longer(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run lasts as long as before, or longer. `max_steps` overrides `epochs`; the two are not compared."""
    by = "epochs" if before.get("max_steps") is None else "max_steps"
    if (before.get("max_steps") is None) != (now.get("max_steps") is None):
        return False
    return before.get(by) is not None and bool(now[by] >= before[by])


def model_fingerprint(model: Path | str) -> str:
    """SHA-256 over a model directory's file names, sizes, and the start, middle and end of each.

    Not the whole of each, for a large model takes minutes to read: enough to tell apart any two models, not
    to notice a forged one. A Hub name stands for itself.

    Raises:
        ModelFileError: a file cannot be read.
    """
    directory = Path(model)
    if not directory.is_dir():
        return str(model)
    total = hashlib.sha256()
    try:
        for path in sorted(directory.iterdir()):
            if path.is_file() and path.suffix in {".json", ".safetensors", ".model", ".jinja", ".txt"}:
                size = path.stat().st_size
                total.update(f"{path.name}/{size}/".encode())
                with path.open("rb") as file:
                    for start in (0, max(0, size // 2), max(0, size - _SAMPLE_BYTES)):
                        file.seek(start)
                        total.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ModelFileError(f"{directory}: cannot be read: {error.strerror or error}") from error
    return total.hexdigest()


FORMAT = 1
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_FOLDER = "checkpoints"
_ADVICE = "delete it to go on from the checkpoint before it"


@dataclass(frozen=True)
class Progress:
    """A run so far: every step's event, and (step, loss) of every measurement on the eval records."""

    steps: tuple[StepEvent, ...] = ()
    evals: tuple[tuple[int, float], ...] = ()

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.steps)

    @property
    def is_measured(self) -> bool:
        """Whether the loss on the eval records was measured after the last step."""
        return bool(self.evals) and self.evals[-1][0] == self.step

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the smallest loss on the eval records, the first of equal ones; None before any training."""
        trained = [(step, loss) for step, loss in self.evals if step]
        return min(trained, key=lambda entry: (math.isnan(entry[1]), entry[1])) if trained else None

    def is_stopped(self, patience: int | None) -> bool:
        """Early stopping: whether the last `patience` measurements were no new smallest loss."""
        if patience is None or self.best is None:
            return False
        return sum(step > self.best[0] for step, _ in self.evals) >= patience


def save_checkpoint(
    directory: RunDirectory,
    peft_model: "PeftModel",
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    ingredients: Mapping[str, Any],
    *,
    kept: int = 2,
    keep_best: bool = False,
) -> None:
    """Write the state after `progress.step` steps, then remove all but the newest.

    Args:
        ingredients: What determines the run (`ingredients`); to resume, it must be the same.
        kept: How many of the newest stay.
        keep_best: Whether the one with the smallest loss on the eval records stays too.

    Raises:
        StorageError: the disk refused; the checkpoints before are as they were.
    """
    files = adapter_files(peft_model) | {OPTIMIZER: _optimizer_bytes(peft_model, optimizer)}
    state = {
        "format": FORMAT,
        "step": progress.step,
        "ingredients": dict(ingredients),
        "steps": [asdict(event) for event in progress.steps],
        "evals": progress.evals,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files[STATE] = json.dumps(state).encode()
    directory.write_directory(f"{_FOLDER}/{_name(progress.step)}", files)
    best = _name(progress.best[0]) if keep_best and progress.best else None
    for name in _names(directory)[:-kept]:
        if name != best:
            directory.remove_directory(f"{_FOLDER}/{name}")


def refuse_other_run(
    directory: RunDirectory, ingredients: Mapping[str, Any], *, load_best: bool = False
) -> Mapping[str, Any] | None:
    """Refuse to go on from the newest checkpoint, if there is one, with other things than it is made of.

    Args:
        load_best: Whether the best checkpoint so far will be needed.

    Returns:
        What the newest checkpoint is made of; None where there is none.

    Raises:
        ConfigError: they differ; the message names them. Or the best checkpoint was not kept.
        StorageError: the checkpoint is damaged, or of another format.
    """
    names = _names(directory)
    if not names:
        return None
    state = _read_state(directory, f"{_FOLDER}/{names[-1]}")
    state.refuse_other(ingredients)
    best = state.progress.best
    if load_best and best is not None and _name(best[0]) not in names:
        raise ConfigError(
            f"load_best: the checkpoint of step {best[0]}, the best so far, was not kept, for the run was begun "
            "without load_best and patience; leave it out"
        )
    return state.ingredients


def load_best(directory: RunDirectory, peft_model: "PeftModel", progress: Progress) -> int | None:
    """Put the factors of the best checkpoint into a model.

    Returns:
        Its step; None where the model has the best factors already.

    Raises:
        StorageError: the checkpoint is damaged, or not there.
    """
    if progress.best is None or progress.best[0] == progress.step:
        return None
    step = progress.best[0]
    folder = f"{_FOLDER}/{_name(step)}"
    files = _read_files(directory, folder, _read_state(directory, folder))
    set_adapter_weights(peft_model, files[WEIGHTS], where=str(directory.root / folder / WEIGHTS))
    return step


def resume(
    directory: RunDirectory,
    peft_model: "PeftModel",
    optimizer: torch.optim.Optimizer,
    ingredients: Mapping[str, Any],
) -> Progress:
    """Put the newest checkpoint's state into model and optimizer; without one, leave both as they are.

    Raises:
        ConfigError: the checkpoint is of a run made of other things; the message names them.
        StorageError: the checkpoint is damaged, or of another format.
    """
    names = _names(directory)
    if not names:
        return Progress()
    folder = f"{_FOLDER}/{names[-1]}"
    where = directory.root / folder
    state = _read_state(directory, folder)
    state.refuse_other(ingredients)
    files = _read_files(directory, folder, state)
    set_adapter_weights(peft_model, files[WEIGHTS], where=str(where / WEIGHTS))
    _load_optimizer(peft_model, optimizer, files[OPTIMIZER], str(where / OPTIMIZER))
    return state.progress


@dataclass(frozen=True)
class _State:
    """What state.json says."""

    ingredients: Mapping[str, Any]
    progress: Progress
    sha256: Mapping[str, str]

    def refuse_other(self, ingredients: Mapping[str, Any]) -> None:
        before, now = self.ingredients, json.loads(json.dumps(dict(ingredients)))  # as from disk: tuples are lists
        keys = changed(before, now)
        if keys:
            changes = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)
            raise ConfigError(f"cannot resume, this is another run: {changes}. Undo that, or choose another --out")


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _names(directory: RunDirectory) -> list[str]:
    found = [path.name for path in (directory.root / _FOLDER).glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda name: int(name[5:]))


def _read_state(directory: RunDirectory, folder: str) -> _State:
    where = directory.root / folder
    try:
        state = json.loads(directory.read(f"{folder}/{STATE}"))
        version, made_of, digests = state["format"], dict(state["ingredients"]), dict(state["sha256"])
        steps = tuple(StepEvent(**event) for event in state["steps"])
        evals = tuple((int(step), float(loss)) for step, loss in state["evals"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{where}: damaged: {STATE} is not what was written; {_ADVICE}") from error
    if version != FORMAT:
        raise StorageError(f"{where}: format {version}; this version reads format {FORMAT} alone")
    return _State(made_of, Progress(steps, evals), digests)


def _read_files(directory: RunDirectory, folder: str, state: _State) -> dict[str, bytes]:
    """The contents of the two binary files."""
    where = directory.root / folder
    files = {name: directory.read(f"{folder}/{name}") for name in (WEIGHTS, OPTIMIZER)}
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != state.sha256.get(name):
            raise StorageError(f"{where}: damaged: {name} is not what was written; {_ADVICE}")
    return files


def _optimizer_bytes(peft_model: "PeftModel", optimizer: torch.optim.Optimizer) -> bytes:
    if isinstance(optimizer, RemotelyOptimized):
        optimizer.fetch_state()
    moments = {}
    for name, parameter in peft_model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}/{moment}"] = value.contiguous().cpu()
    content: bytes = save_tensors(moments)
    return content


def _load_optimizer(peft_model: "PeftModel", optimizer: torch.optim.Optimizer, content: bytes, where: str) -> None:
    try:
        moments = load_tensors(content)
    except SafetensorError as error:
        raise StorageError(f"{where}: not a whole safetensors file: {error}") from error
    parameters = dict(peft_model.named_parameters())
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        if name not in parameters:
            raise StorageError(f"{where}: holds moments of {name}, which the model does not have")
        # AdamW counts its steps on the CPU and keeps the moments beside the parameter.
        device = value.device if moment == "step" else parameters[name].device
        optimizer.state[parameters[name]][moment] = value.to(device)
    if isinstance(optimizer, RemotelyOptimized):
        optimizer.store_state()
