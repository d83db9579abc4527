"""Everything that determines a run, from a YAML file and the command line, checked once.

Hugging Face's names are accepted beside our own on the command line (`--learning-rate`, `--learning_rate`), in run
files and in `Recipe(learning_rate=...)`: one table for all ways in. docs/finetune.md shows it, and a test compares the
two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from obfuscatune.errors import ConfigError
from obfuscatune.option import Option
from obfuscatune.yaml_file import parse_mapping


@dataclass(frozen=True)
class Alias:
    """Another name of a recipe's field.

    Attributes:
        field: of `Recipe`.
        values: what is accepted, and what the field becomes; None leaves the field as it is. Where there are none,
            the values are the field's own.
    """

    field: str
    values: Mapping[str, Any] | None = None


_INTERVALS: Mapping[str, Any] = {"steps": None, "epoch": "epoch"}
"""With `steps` the number stands in `eval_steps` or `save_steps`."""

ALIASES: Mapping[str, Alias] = {
    # TrainingArguments
    "learning_rate": Alias("lr"),
    "lr_scheduler_type": Alias("schedule"),
    "max_grad_norm": Alias("clip"),
    "per_device_train_batch_size": Alias("batch_size"),
    "gradient_accumulation_steps": Alias("accumulation"),
    "num_train_epochs": Alias("epochs"),
    "output_dir": Alias("out"),
    "eval_steps": Alias("eval_every"),
    "eval_strategy": Alias("eval_every", {"no": None, **_INTERVALS}),
    "save_steps": Alias("checkpoint_every"),
    "save_strategy": Alias("checkpoint_every", _INTERVALS),
    "save_total_limit": Alias("checkpoints_kept"),
    "load_best_model_at_end": Alias("load_best"),
    "early_stopping_patience": Alias("patience"),
    "report_to": Alias("tensorboard", {"none": False, "tensorboard": True}),
    # TRL, and the example scripts of transformers
    "model_name_or_path": Alias("model"),
    "train_file": Alias("data"),
    "validation_file": Alias("eval"),
    "max_seq_length": Alias("max_length"),
    "torch_dtype": Alias("dtype"),
    # LoraConfig
    "r": Alias("lora_r"),
    "lora_rank": Alias("lora_r"),
    "target_modules": Alias("lora_targets"),
    "lora_target_modules": Alias("lora_targets"),
}


def resolve_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Rename settings given under Hugging Face's names to the recipe's; unknown names stay as they are.

    Raises:
        ConfigError: two names of one field with different values, or a value that has no counterpart here.
    """
    resolved: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for name, value in given.items():
        alias = ALIASES.get(name, Alias(name))
        meant = _translate(name, value, alias.values) if alias.values else value
        if alias.values and meant is None:
            continue
        earlier = said_by.setdefault(alias.field, name)
        if earlier != name and not _same(resolved[alias.field], meant):
            raise ConfigError(
                f"{earlier} and {name} are one setting, yet {given[earlier]!r} and {value!r} are given: leave one out"
            )
        resolved.setdefault(alias.field, meant)
    return resolved


def _translate(name: str, value: Any, values: Mapping[str, Any]) -> Any:
    if value is False:  # YAML reads a bare `no` so
        value = "no"
    if not isinstance(value, str) or value not in values:
        raise ConfigError(f"{name}: expected {' or '.join(values)}, found {value!r}")
    return values[value]


def _same(one: Any, other: Any) -> bool:
    """Whether two values mean the same; from a command line numbers come as text."""
    if one == other or str(one) == str(other):
        return True
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return False


DATA, LORA, TRAINING, RUN = "Data", "LoRA", "Training", "Run"
"""Headings of the help."""
Positive = Annotated[int, Field(ge=1)]
Interval = Positive | Literal["epoch"]
"""A number of steps, or the steps of one pass over the data."""


class Recipe(BaseModel):
    """A run of fine-tuning. Each field is a key of the run file and, with dashes, an option of `finetune`.

    The `Option` of a field is what that option's help says; fields without one share theirs with other commands.
    Hugging Face's names of the same settings are accepted too (`ALIASES`).
    Paths are relative to the directory that the command is run in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = None
    """A directory or a Hub name; None is the embedded model."""
    data: Annotated[Path, Option("Training records (with --task, or a data directory).", DATA)]
    eval: Annotated[Path | None, Option("Records whose loss is measured, untrained.", DATA)] = None
    task: Annotated[str | None, Option("The records are those of sciq, openbookqa, piqa or webqs.", DATA)] = None
    out: Annotated[Path, Option("The run directory.", RUN)] = Path("runs/finetune")

    provider_adapter: Path | None = None
    """Directory of a provider's LoRA adapter, which stays frozen under the one that is trained."""
    plain: bool = False
    """Run unprotected, for comparison."""
    profile: str = "private"
    first_blocks: Annotated[int, Field(ge=0)] | None = None
    """Blocks that stay in the enclave; None is as the profile says."""
    worker: str | None = None
    """Address of a running worker; None starts one on this machine."""
    fleet: Path | None = None
    """File that names many workers, in the place of one."""
    mask_worker: str | None = None
    """Under profile guarded, that of the worker that multiplies the masks, which must be in another hand."""
    mask_memory: str | None = None
    """For masks that are drawn ahead, as 512MiB; None is 1GiB."""
    mask_budget: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Largest advantage in telling two inputs apart that the compute worker may ever have; None is 0.01."""
    enclave_device: str | None = None
    """Where the enclave's own part lies: cpu, or cuda:N, a confidential GPU; None is the CPU."""
    base: Literal["closed", "public"] | None = None
    """Whether the base model's weights were ever published; None looks for signs of it, and warns."""
    public_base: bool = False
    """The model's weights are published themselves: under profile guarded, workers hold them as they are."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    lora_r: Annotated[Positive, Option("Rank.", LORA)] = 16
    lora_alpha: Annotated[float, Field(gt=0), Option("Scale times rank.", LORA)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1), Option("Share of inputs dropped.", LORA)] = 0.05
    lora_targets: Annotated[
        Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)],
        Option("Layer names, comma between.", LORA),
    ] = "all-linear"

    lr: Annotated[float, Field(gt=0, le=100), Option("Peak learning rate.", TRAINING)] = 2e-4
    schedule: Annotated[Literal["linear", "cosine", "constant"], Option("linear, cosine or constant.", TRAINING)] = (
        "linear"
    )
    warmup_steps: Annotated[int, Field(ge=0), Option("Steps to the peak.", TRAINING)] = 0
    warmup_ratio: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None, Option("Instead: the share of all steps.", TRAINING)
    ] = None
    """Rounded up to a whole step."""
    weight_decay: Annotated[float, Field(ge=0), Option("AdamW's.", TRAINING)] = 0.0
    clip: Annotated[float, Field(gt=0), Option("Largest gradient norm.", TRAINING)] = 1.0
    batch_size: Annotated[Positive, Option("Examples in a forward pass.", TRAINING)] = 8
    accumulation: Annotated[Positive, Option("Forward passes in a step.", TRAINING)] = 1
    epochs: Annotated[Positive, Option("Passes over the data.", TRAINING, read_as=float)] = 3
    """Read as a float on the command line: `--num_train_epochs 3.0` is usual elsewhere."""
    max_steps: Annotated[Positive | None, Option("Overrides --epochs.", TRAINING)] = None
    gradient_checkpointing: Annotated[bool, Option("Compute activations twice, for less memory.", TRAINING)] = False

    max_length: Annotated[
        Annotated[int, Field(ge=2)] | None, Option("Tokens of an example.", DATA, unset="the model's window")
    ] = None
    too_long: Annotated[Literal["error", "truncate", "drop"], Option("Longer ones: error, truncate or drop.", DATA)] = (
        "error"
    )
    fields: Annotated[dict[str, str], Option("Which columns hold what: prompt=question,completion=answer.", DATA)] = {}
    """Columns of the data, by the names of the fields that they hold: `{prompt: question}`."""
    split_turns: Annotated[
        bool, Option("An example of each turn, where the chat template rewrites earlier ones.", DATA)
    ] = False

    checkpoint_every: Annotated[Interval, Option("Steps between checkpoints, or epoch.", RUN)] = 50
    """There is always one after the last step."""
    checkpoints_kept: Annotated[Positive, Option("How many of the newest stay.", RUN)] = 2
    """The best one stays besides, where `patience` or `load_best` needs it."""
    eval_every: Annotated[
        Interval | None, Option("Steps between measurements, or epoch.", RUN, unset="before and after")
    ] = None
    """None measures on `eval` before the first step and after the last."""
    patience: Annotated[Positive | None, Option("Stop after so many measurements without a new best.", RUN)] = None
    load_best: Annotated[bool, Option("Make the adapter of the best checkpoint, not of the last.", RUN)] = False
    """The best is the one with the smallest loss on `eval`."""
    tensorboard: Annotated[bool, Option("Write event files for TensorBoard into --out.", RUN)] = False
    logging_steps: Annotated[Positive, Option("Steps between points in TensorBoard.", RUN)] = 1
    """metrics.jsonl has every step."""
    seed: Annotated[int, Field(ge=0), Option("Of order, fresh factors and dropout.", RUN)] = 0

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        try:
            return resolve_names(given)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """One text with commas, as on the command line, is a list of names."""
        if not isinstance(value, str) or value == "all-linear":
            return value
        return tuple(name.strip() for name in value.split(",") if name.strip())

    @field_validator("fields", mode="before")
    @classmethod
    def _columns(cls, value: Any) -> Any:
        """One text, as on the command line: `prompt=question,completion=answer`."""
        if not isinstance(value, str):
            return value
        pairs = [pair.partition("=") for pair in value.split(",")]
        if not all(name.strip() and column.strip() for name, _, column in pairs):
            raise ValueError("expected FIELD=COLUMN, comma between")
        return {name.strip(): column.strip() for name, _, column in pairs}

    @field_validator("schedule", mode="before")
    @classmethod
    def _constant(cls, value: Any) -> Any:
        """Ours has a warm-up if one is asked for, as `constant_with_warmup` of transformers has."""
        return "constant" if value == "constant_with_warmup" else value

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        for name in ("eval_every", "patience", "load_best"):
            if getattr(self, name) and self.eval is None:
                raise ValueError(f"{name} is given, but no eval to measure on")
        for name in ("patience", "load_best"):
            if getattr(self, name) and self.eval_every is None:
                raise ValueError(f"{name} needs measurements while training goes on: give eval_every too")
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ValueError("warmup_steps and warmup_ratio are both given: leave one out")
        for name in ("worker", "fleet", "mask_worker"):
            if self.plain and getattr(self, name) is not None:
                raise ValueError(f"plain runs without a worker, yet {name} is given")
        return self

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint with the smallest loss on `eval` stays, however old it is."""
        return self.load_best or self.patience is not None

    def to_yaml(self) -> str:
        """The resolved recipe, as a run file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(config: Path | None, overrides: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Recipe:
    """Read a run file, if there is one, and lay the command line's options over it.

    Args:
        config: A YAML file whose keys are `Recipe`'s fields.
        overrides: Fields given on the command line; those that are None were not given.
        defaults: Fields that hold where neither of these says anything: what the environment says.

    Raises:
        ConfigError: the file cannot be read or is not a mapping; a key is unknown or given twice; a value is
            outside its range.
    """
    fields = {} if config is None else _read(config)
    known = [*Recipe.model_fields, *ALIASES]
    unknown = next((key for key in fields if key not in known), None)
    if unknown is not None:
        near = get_close_matches(str(unknown), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(Recipe.model_fields)}"
        raise ConfigError(f"{config}: unknown key {unknown}{hint}")
    try:
        fields = resolve_names(fields)
    except ConfigError as error:
        raise ConfigError(f"{config}: {error}") from error
    given = resolve_names({key: value for key, value in overrides.items() if value is not None})
    said = {**fields, **given}
    if said.get("plain"):  # the environment names a worker for the runs that want one
        defaults = {
            key: value for key, value in (defaults or {}).items() if key not in ("worker", "fleet", "mask_worker")
        }
    try:
        return Recipe.model_validate({**(defaults or {}), **said})
    except ValidationError as error:
        raise ConfigError(_explain(error, config, given)) from error


def _explain(error: ValidationError, config: Path | None, given: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{key} is missing: give --{key} or put it in a run file (--config)"
    if key in given or config is None:
        return f"--{key.replace('_', '-')}: {message}, found {first['input']!r}"
    return f"{config}: {key}: {message}, found {first['input']!r}"


def _read(config: Path) -> dict[str, Any]:
    try:
        content = config.read_bytes()
    except OSError as error:
        raise ConfigError(f"{config}: cannot be read: {error.strerror or error}") from error
    return parse_mapping(content, config, "expected keys and values, such as `lr: 0.0002`")
