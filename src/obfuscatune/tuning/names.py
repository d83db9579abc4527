"""Names that users know from Hugging Face, and the recipe's fields that they mean: one table for all ways in.

The same names are accepted on the command line (`--learning-rate`, `--learning_rate`), in run files and in
`Recipe(learning_rate=...)`. docs/finetune.md shows the table, and a test compares it with this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from obfuscatune.wire.errors import ConfigError


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
    """The same values under the names of the recipe's fields; names that are in no table stay as they are.

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
