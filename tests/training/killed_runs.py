"""Runs that die by SIGKILL at chosen moments, each followed by one that resumes: `killed_runs.py MODEL DATA FOLDER`.

A program of its own, because it forks: every run is a process, and one that imports nothing anew. Before the first
fork no tensor is touched, so that no thread exists which a child would miss. Prints which scenarios
died, as JSON; what they left is in FOLDER/<scenario>.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import peft  # noqa: F401  as are the next two, for the children to have
import torch._dynamo
import torch.optim.adamw  # noqa: F401
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from obfuscatune.training import run, storage
from obfuscatune.training.loop import StepEvent
from obfuscatune.training.recipe import Recipe

Arm = Callable[[], Callable[[object], None]]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def unharmed() -> Callable[[object], None]:
    return lambda event: None


def after_step(step: int) -> Arm:
    """Die between a step and what is written after it."""

    def watch(event: object) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            die()

    return lambda: watch


def in_write(number: int) -> Arm:
    """Die in the middle of the `number`-th file that is written durably."""

    def arm() -> Callable[[object], None]:
        written = 0
        real = storage._write_durably

        def write(name: str, content: bytes, folder: int) -> None:
            nonlocal written
            written += 1
            if written == number:
                real(name, content[: len(content) // 2], folder)
                die()
            real(name, content, folder)

        storage._write_durably = write
        return lambda event: None

    return arm


def in_sync(number: int) -> Arm:
    """Die when something is synchronised for the `number`-th time: a file, or a folder before or after a rename."""

    def arm() -> Callable[[object], None]:
        synced = 0
        real = storage.sync

        def sync(descriptor: int) -> None:
            nonlocal synced
            synced += 1
            if synced == number:
                die()
            real(descriptor)

        storage.sync = sync
        return lambda event: None

    return arm


def in_removal(number: int) -> Arm:
    """Die when the `number`-th old checkpoint is half deleted."""

    def arm() -> Callable[[object], None]:
        removed = 0
        real = storage.shutil.rmtree

        def remove(name: str, *, dir_fd: int) -> None:
            nonlocal removed
            removed += 1
            if removed == number:
                folder = os.open(name, os.O_RDONLY, dir_fd=dir_fd)
                os.unlink(os.listdir(folder)[0], dir_fd=folder)
                die()
            real(name, dir_fd=dir_fd)

        storage.shutil.rmtree = remove
        return lambda event: None

    return arm


SCENARIOS: dict[str, list[Arm]] = {
    "uninterrupted": [],
    "before-any-checkpoint": [after_step(1)],
    "between-checkpoints": [after_step(5)],
    "at-a-checkpoint": [after_step(4)],
    "after-the-last-step": [after_step(9)],
    # The first two files are metrics.jsonl and recipe.yaml, then four for each of five checkpoints, then the adapter.
    **{f"writing-file-{number}": [in_write(number)] for number in (1, 2, 3, 4, 6, 21, 23)},
    **{f"synchronising-{number}": [in_sync(number)] for number in (4, 6, 9, 10, 11)},
    "deleting-a-checkpoint": [in_removal(1)],
    "again-and-again": [after_step(3), in_write(5), in_removal(1), after_step(8), in_write(3)],
}


def one_run(model_dir: Path, data: Path, out: Path, arm: Arm, resume: bool) -> bool:
    """Whether the run came to its end."""
    child = os.fork()
    if child == 0:
        model = GPT2LMHeadModel.from_pretrained(model_dir)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
        recipe = Recipe(
            data=data,
            eval=data,
            out=out,
            plain=True,
            lora_r=2,
            lora_dropout=0.2,
            lr=0.01,
            batch_size=2,
            accumulation=2,
            max_steps=9,
            eval_every=3,
            checkpoint_every=2,
            schedule="cosine",
            warmup_steps=2,
        )
        data_read = run.load_data(recipe, tokenizer, model.config)
        run.finetune(model, tokenizer, recipe, data_read, fingerprint="m", report=arm(), resume_run=resume)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status) != 0:
        sys.exit(f"{out.name}: the run failed")
    return True


def main() -> None:
    model_dir, data, folder = map(Path, sys.argv[1:])
    deaths = {}
    for name, arms in SCENARIOS.items():
        ended = [one_run(model_dir, data, folder / name, arm, resume=bool(i)) for i, arm in enumerate(arms)]
        ended.append(one_run(model_dir, data, folder / name, unharmed, resume=bool(arms)))
        deaths[name] = ended.count(False)
        if not ended[-1]:
            sys.exit(f"{name}: the last run was to come to its end")
    sys.stdout.write(json.dumps(deaths))


main()
