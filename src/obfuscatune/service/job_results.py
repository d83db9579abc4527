"""What a trainer told, gathered; and a run's metrics as OpenAI's result file."""

import csv
import io
import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""OpenAI's. Accuracies are not computed, and left empty."""


@dataclass
class Outcome:
    """A job so far."""

    before: dict[str, int]
    """Products up to the checkpoint that this attempt went on from."""
    began: int = field(default_factory=lambda: int(time.time()))
    total_steps: int = 0
    tokens: int = 0
    examples: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    measured: dict[int, float] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    failure: dict[str, Any] | None = None
    is_done: bool = False
    is_stopped: bool = False
    done: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, str] = field(default_factory=dict)
    """SHA-256 of its files, in hex."""
    losses_digest: str = ""
    steps: int = 0
    seconds: float = 0.0
    """Of the steps of this attempt."""
    attempted: int = 0
    """Steps of this attempt."""
    live: dict[str, Any] = field(default_factory=dict)
    """Products and masks up to the newest event, those of steps that a restart repeats among them."""

    def progress(self) -> dict[str, Any]:
        """How far it is: for whoever watches."""
        products = self.live.get("products") or {}
        return {
            "step": self.steps,
            "total_steps": self.total_steps,
            "tokens": self.tokens,
            "examples": self.examples,
            "seconds_per_step": self.seconds / self.attempted if self.attempted else None,
            "products": {it: self.before.get(it, 0) + int(products.get(it, 0)) for it in ("requests", "verified")},
            "masks": self.live.get("masks"),
        }

    @property
    def products(self) -> dict[str, int]:
        """Requests to the worker and verified products: of the steps that count."""
        return {name: self.before.get(name, 0) + self.counted.get(name, 0) for name in ("requests", "verified")}

    def take(self, event: dict[str, Any]) -> None:
        """Take in an event."""
        if "products" in event and "masks" in event:
            self.live = {"products": event["products"], "masks": event["masks"]}
        match event["kind"]:
            case "started":
                self.total_steps, self.tokens = int(event["total_steps"]), int(event["tokens"])
                self.examples = int(event["examples"])
            case "step":
                self.losses[int(event["step"])] = finite(float(event["loss"]))
                self.steps, self.attempted = int(event["step"]), self.attempted + 1
                self.seconds += float(event["seconds"])
            case "measured":
                self.measured[int(event["step"])] = finite(float(event["loss"]))
            case "checkpoint":
                self._count(event)
            case "done":
                self.is_done, self.done = True, event
                self._count(event)
            case "stopped":
                self.is_stopped = True
            case "failed":
                self.failure = event

    def _count(self, event: dict[str, Any]) -> None:
        self.counted = {name: int(value) for name, value in event["products"].items()}


def finite(value: float) -> float:
    """A number that JSON has."""
    return value if math.isfinite(value) else 0.0


def results_csv(metrics: bytes) -> bytes:
    """`metrics.jsonl` of a run as CSV: a row for each step."""
    by_step: dict[int, dict[str, float]] = {}
    for line in metrics.splitlines():
        entry = json.loads(line)
        row = by_step.setdefault(int(entry["step"]), {})
        if "eval_loss" in entry:
            row["valid_loss"] = float(entry["eval_loss"])
        else:
            row["train_loss"] = float(entry["loss"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step, row in sorted(by_step.items()):
        writer.writerow([step, *("" if row.get(name) is None else f"{row[name]:.6f}" for name in COLUMNS[1:])])
    return text.getvalue().encode()
