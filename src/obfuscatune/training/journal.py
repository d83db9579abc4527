"""What happens in a run: told to the caller as it happens, and written to metrics.jsonl, or to TensorBoard as well.

TensorBoard's event files stay on this machine: nothing is sent anywhere.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from obfuscatune.errors import ConfigError, StorageError
from obfuscatune.training.checkpoint import Progress
from obfuscatune.training.data import Data
from obfuscatune.training.loop import StepEvent
from obfuscatune.training.storage import RunDirectory

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Started:
    """The data is read and the model ready; `first_step` steps are already taken.

    `planned_before` is how many steps the run was to have when it was last begun, where that was fewer.
    """

    first_step: int
    total_steps: int
    data: Data
    planned_before: int | None = None


@dataclass(frozen=True)
class Measured:
    """Mean loss on the eval records, in nats per token, after `step` steps."""

    step: int
    loss: float


Event = Started | StepEvent | Measured


class Journal:
    """The progress of a run, its file of metrics, and whoever watches."""

    def __init__(self, directory: RunDirectory, progress: Progress, report: Callable[[Event], None]) -> None:
        """Begin the file anew with what a checkpoint knows: a killed process may have written further.

        Raises:
            StorageError: the disk refused.
        """
        self.progress = progress
        self._directory = directory
        self._report = report
        directory.write_file(METRICS, _lines(progress))

    def stepped(self, event: StepEvent) -> None:
        """Record a step.

        Raises:
            StorageError: the disk refused.
        """
        self.progress = replace(self.progress, steps=(*self.progress.steps, event))
        self._directory.append(METRICS, _line(asdict(event)))
        self._report(event)

    def measured(self, loss: float) -> None:
        """Record the loss on the eval records after the steps so far.

        Raises:
            StorageError: the disk refused.
        """
        step = self.progress.step
        self.progress = replace(self.progress, evals=(*self.progress.evals, (step, loss)))
        self._directory.append(METRICS, _line({"step": step, "eval_loss": loss}))
        self._report(Measured(step, loss))


def _lines(progress: Progress) -> bytes:
    steps = [(event.step, 0, asdict(event)) for event in progress.steps]
    evals = [(step, 1, {"step": step, "eval_loss": loss}) for step, loss in progress.evals]
    ordered = sorted([*steps, *evals], key=lambda entry: entry[:2])
    return b"".join(_line(fields) for _, _, fields in ordered)


def _line(fields: dict[str, object]) -> bytes:
    return json.dumps(fields).encode() + b"\n"


FOLDER = "tensorboard"


@contextmanager
def also_on_board(
    report: Callable[[Event], None], directory: RunDirectory, progress: Progress, every: int
) -> Iterator[Callable[[Event], None]]:
    """A `report` that passes events on, and writes those with numbers to `<out>/tensorboard`.

    The folder is begun anew with what a checkpoint knows, as metrics.jsonl is: a resumed run leaves what an
    uninterrupted one leaves.

    Args:
        every: Steps between points: their losses' mean, the last one's learning rate and gradient norm.

    Raises:
        ConfigError: TensorBoard is not installed.
        StorageError: the disk refused.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"tensorboard cannot be imported ({error}); run: pip install 'obfuscatune[tensorboard]'"
        ) from error
    directory.write_directory(FOLDER, {})
    try:
        with SummaryWriter(str(directory.root / FOLDER)) as writer:
            board = _Board(writer, every)
            for event in _told_before(progress):
                board.see(event)

            def told(event: Event) -> None:
                board.see(event)
                report(event)

            yield told
    except OSError as error:
        raise StorageError(f"{directory.root / FOLDER}: the disk refused: {error.strerror or error}") from error


class _Board:
    def __init__(self, writer: Any, every: int) -> None:
        self._writer = writer
        self._every = every
        self._losses: list[float] = []

    def see(self, event: Event) -> None:
        if isinstance(event, Measured):
            self._writer.add_scalar("eval/loss", event.loss, event.step)
        elif isinstance(event, StepEvent):
            self._losses.append(event.loss)
            if event.step % self._every == 0:
                self._writer.add_scalar("train/loss", fmean(self._losses), event.step)
                self._writer.add_scalar("train/learning_rate", event.lr, event.step)
                self._writer.add_scalar("train/grad_norm", event.grad_norm, event.step)
                self._losses.clear()


def _told_before(progress: Progress) -> Iterator[Event]:
    yield from progress.steps
    for step, loss in progress.evals:
        yield Measured(step, loss)
