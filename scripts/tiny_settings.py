"""What a run of `train_tiny_model.py` is made of, and its command line."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

OPTIMIZERS = ("muon", "adamw")


class TrainingError(Exception):
    """The training cannot go on; the message says what was expected and what to do."""


def option(default: Any, text: str, **more: Any) -> Any:
    """Return a dataclass field that becomes a command-line option with `text` as its help."""
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Settings:
    """What a run is made of; every field is a command-line option of the same name."""

    out: Path = field(default=Path("tiny-model"), metadata={"help": "folder for the finished model"})
    work: Path = field(
        default=Path("tiny-model-work"), metadata={"help": "folder for the checkpoint and the cached tokens"}
    )
    corpus: Path = field(
        default=Path("../shared/data/corpus/eltec-eng.txt.xz"), metadata={"help": "plain text, .xz or not"}
    )
    heldout: int = option(2, "novels kept for measuring perplexity")
    vocab: int = option(4096, "tokenizer entries, at most 65536")
    layers: int = option(4, "transformer blocks")
    width: int = option(256, "hidden size")
    heads: int = option(4, "attention heads")
    positions: int = option(256, "context length in tokens")
    optimizer: str = option("muon", "muon: for the block matrices, AdamW for the rest", choices=OPTIMIZERS)
    lr: float = option(5e-3, "peak learning rate")
    warmup: float = option(0.02, "share of the budget spent on linear warm-up")
    weight_decay: float = option(0.1, "decoupled weight decay on matrices")
    clip: float = option(1.0, "largest gradient norm")
    batch: int = option(16, "sequences per step")
    steps: int = option(0, "step budget; 0: none")
    minutes: float = option(0.0, "wall-time budget; 0: none")
    snapshot_minutes: float = option(4.0, "time between snapshots")
    threads: int = option(2, "CPU threads")
    device: str = option("cpu", "torch device")
    bf16: bool = option(True, "bf16 autocast")
    compile: bool = option(True, "torch.compile")
    resume: bool = option(False, "go on from the last checkpoint in --work")
    seed: int = option(0, "seed of everything random")


def parse_settings(description: str | None, argv: list[str] | None = None) -> Settings:
    """Read the command line into `Settings`; exits with a message where a value cannot work."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    for item in fields(Settings):
        if item.default is MISSING:
            raise TrainingError(f"setting {item.name} needs a default")
        kind: dict[str, Any] = {"type": type(item.default)}
        if isinstance(item.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        name = "--" + item.name.replace("_", "-")
        parser.add_argument(name, default=item.default, **kind, **item.metadata)
    settings = Settings(**vars(parser.parse_args(argv)))
    if settings.steps <= 0 and settings.minutes <= 0:
        parser.error("give a budget: --steps, --minutes or both")
    if settings.width % settings.heads or settings.vocab > 65536:
        parser.error("--width must be a multiple of --heads, and --vocab at most 65536")
    return settings
