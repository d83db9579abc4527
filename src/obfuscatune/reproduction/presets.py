"""How much is measured, and how a model is protected in a row of a table: a profile and the knobs of an ablation.

    plain              no protection
    enclave            everything in the enclave: nothing crosses
    paper              the paper's scheme: orthogonal matrices, condition number 1
    private            our default: both sides, mixing, LoRA in the enclave
    gaussian           the paper's scheme with naive random matrices
    conditioned(8)     the paper's scheme with matrices of that condition number

The preset `paper` is the paper's own recipe; the others are scaled down, and named as such. `real` is for a pre-trained
model of some hundred million parameters on two cores: `make reproduce-real`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from obfuscatune.enclave.profiles import PRESETS as PROFILES
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.transforms import TransformSpec
from obfuscatune.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """A name, and what `protect` is told; `profile` is None where nothing is protected."""

    name: str
    profile: str | None
    knobs: Mapping[str, Any]

    @property
    def resolved(self) -> Mapping[str, Any] | None:
        """Every knob, as it stands in the settings of a cell."""
        return None if self.profile is None else asdict(resolve(self.profile, **self.knobs))

    @property
    def condition_number(self) -> float | None:
        """As far as it is chosen: None for `gaussian`, where it is whatever it happens to be, and for `plain`."""
        if self.profile is None or self.name == "gaussian":
            return None
        return TransformSpec.parse(resolve(self.profile, **self.knobs).transform).kappa


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name == "plain":
        return Method(name, None, {})
    if name in PROFILES:
        return Method(name, name, {})
    if name == "gaussian" or name.startswith("conditioned("):
        TransformSpec.parse(name)
        return Method(name, "paper", {"transform": name})
    known = ", ".join(["plain", *PROFILES, "gaussian", "conditioned(KAPPA)"])
    raise ConfigError(f"--methods: unknown method {name!r}; known are {known}")


TASKS = ("webqs", "openbookqa", "piqa", "sciq")
"""In the paper's order."""
KAPPAS = (1, 8, 32, 128, 160)
"""The condition numbers of the paper's table."""
SIXTEEN_BITS = ("bfloat16", "float16")
ABLATIONS = (*(f"conditioned({kappa})" for kappa in KAPPAS), "gaussian")


@dataclass(frozen=True)
class ShapeDepth:
    """A named shape (bench/workload.py), and how many of its blocks are built; all of them if None."""

    shape: str
    layers: int | None = None


@dataclass(frozen=True)
class Preset:
    """One size of the whole reproduction.

    Attributes:
        epochs, batch_size, lr, schedule: of every fine-tuning; the rest is the paper's: r 16, alpha 32, dropout 0.05.
        records: training records of each task, the first ones; None for all.
        heldout: test records whose loss is measured before and after.
        questions: test questions of each task; None for all.
        recalled: training questions that are asked too: what was learnt from them shows there first.
        methods: those that every task is tuned with.
        ablations: those that only `ablation_tasks` are tuned with, and that are asked in 16 bits.
        ablation_seeds: how many of the seeds; None for all.
        untuned: whether the model is also asked before it is tuned.
        sixteen_bits: the number formats besides float32 that models are asked in, and whose error is measured.
        depths: blocks after which the logits' error is measured, in a model that has so many.
        error_shapes: random-weight shapes for the error, with how many of their blocks.
        error_tokens: length of the sequence that the error is measured on.
        slowdown: shapes that are timed.
        slowdown_rounds: counted steps of each side.
        step_batch, step_length: sequences of one timed step, and tokens of each.
        obfuscate: shapes that are written to disk and brought under protection from there.
    """

    name: str
    epochs: int
    lr: float
    records: int | None
    heldout: int
    questions: int | None
    recalled: int
    seeds: tuple[int, ...]
    ablations: tuple[str, ...]
    ablation_tasks: tuple[str, ...]
    depths: tuple[int, ...]
    error_tokens: int
    batch_size: int = 8
    schedule: str = "linear"
    methods: tuple[str, ...] = ("plain", "paper", "private")
    ablation_seeds: int | None = None
    untuned: bool = False
    sixteen_bits: tuple[str, ...] = SIXTEEN_BITS
    error_shapes: tuple[ShapeDepth, ...] = ()
    slowdown: tuple[ShapeDepth, ...] = ()
    slowdown_rounds: int = 5
    step_batch: int = 2
    step_length: int = 256
    obfuscate: tuple[ShapeDepth, ...] = ()


_SIZES = tuple(map(ShapeDepth, ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")))

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "paper",
            epochs=10,
            batch_size=1,
            lr=3e-5,
            schedule="constant",
            records=None,
            heldout=200,
            questions=None,
            recalled=200,
            seeds=(0, 1, 2),
            methods=("plain", "enclave", "paper", "private"),
            ablations=ABLATIONS,
            ablation_tasks=TASKS,
            depths=(1, 2, 4, 8, 12, 24, 36, 48),
            error_shapes=_SIZES,
            error_tokens=256,
            slowdown=_SIZES,
            slowdown_rounds=11,
            obfuscate=_SIZES,
        ),
        Preset(
            "cpu",
            epochs=10,
            lr=1e-3,
            records=64,
            heldout=64,
            questions=300,
            recalled=64,
            seeds=(0, 1, 2),
            ablations=ABLATIONS[1:],  # condition number 1 is that of `paper`
            ablation_tasks=("sciq",),
            ablation_seeds=1,
            depths=(1, 2, 4, 8, 12),
            error_shapes=(ShapeDepth("gpt2"),),
            error_tokens=64,
            slowdown=(
                ShapeDepth("gpt2"),
                ShapeDepth("gpt2-medium", 8),
                ShapeDepth("gpt2-large", 6),
                ShapeDepth("gpt2-xl", 4),
            ),
            obfuscate=_SIZES,
        ),
        Preset(
            "real",
            epochs=2,
            lr=3e-4,
            records=128,
            heldout=32,
            questions=100,
            recalled=16,
            seeds=(0,),
            ablations=("conditioned(128)", "gaussian"),
            ablation_tasks=("piqa",),
            ablation_seeds=1,
            untuned=True,
            sixteen_bits=("bfloat16",),
            depths=(1, 2, 4, 8, 16, 30),
            error_tokens=64,
        ),
        Preset(
            "smoke",
            epochs=2,
            lr=2e-3,
            records=16,
            heldout=8,
            questions=16,
            recalled=16,
            seeds=(0, 1),
            ablations=("conditioned(8)", "gaussian"),
            ablation_tasks=("sciq",),
            depths=(1, 2),
            error_shapes=(ShapeDepth("gpt2", 2),),
            error_tokens=16,
            slowdown=(ShapeDepth("gpt2", 2),),
            slowdown_rounds=1,
            step_batch=1,
            step_length=32,
            obfuscate=(ShapeDepth("gpt2", 2),),
        ),
    )
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"--preset: unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
