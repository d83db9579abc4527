"""What happens in a run: told to the caller as it happens, and written to metrics.jsonl."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from obfuscatune.tuning.checkpoint import Progress
from obfuscatune.tuning.data import Data
from obfuscatune.tuning.loop import StepEvent
from obfuscatune.tuning.storage import RunDirectory

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
