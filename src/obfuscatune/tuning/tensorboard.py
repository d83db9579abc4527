"""The run's losses as event files for TensorBoard, on this machine: nothing is sent anywhere.

Needs the extra `tensorboard`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from obfuscatune.tuning.checkpoint import Progress
from obfuscatune.tuning.journal import Event, Measured
from obfuscatune.tuning.loop import StepEvent
from obfuscatune.tuning.storage import RunDirectory
from obfuscatune.wire.errors import ConfigError, StorageError

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
