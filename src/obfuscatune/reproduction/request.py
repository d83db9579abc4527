"""What is asked for: a preset, and what the user would have otherwise. Checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from obfuscatune.reproduction.methods import find_method
from obfuscatune.reproduction.presets import Preset, find_preset
from obfuscatune.tuning.tasks import find_task
from obfuscatune.wire.errors import ConfigError

PARTS = ("accuracy", "error", "share", "slowdown", "obfuscate")


@dataclass(frozen=True)
class Request:
    """A resolved request.

    Attributes:
        parts: of `PARTS`, in their order.
        tasks: question sets, in the order of the tables.
        model: a directory or a hub id; None for the embedded model.
        data_root: a folder or a data set on the hub; needed for accuracy alone.
    """

    out: Path
    preset: Preset
    parts: tuple[str, ...]
    tasks: tuple[str, ...]
    model: str | None
    data_root: str | Path | None

    @classmethod
    def resolve(
        cls,
        out: Path,
        *,
        preset: str,
        parts: Sequence[str],
        tasks: Sequence[str],
        methods: Sequence[str] | None,
        seeds: Sequence[int] | None,
        model: str | None,
        data_root: str | Path | None,
        records: int | None,
        limit: int | None,
    ) -> Request:
        """Lay the user's choices over the preset.

        Args:
            methods: in place of the preset's; ablations among them are tuned with on the preset's ablation tasks only.
            records: training records of each task, in place of the preset's.
            limit: test questions of each task, in place of the preset's.

        Raises:
            ConfigError: an unknown preset, part, task or method; none of them; a number out of its range.
        """
        chosen = find_preset(preset)
        for name, values in (("--parts", parts), ("--tasks", tasks), ("--methods", methods), ("--seeds", seeds)):
            if values is not None and not values:
                raise ConfigError(f"{name}: expected at least one")
        unknown = next((part for part in parts if part not in PARTS), None)
        if unknown is not None:
            raise ConfigError(f"--parts: unknown part {unknown!r}; the parts are {', '.join(PARTS)}")
        for task in tasks:
            find_task(task)
        if methods is not None:
            for method in methods:
                find_method(method)
            chosen = replace(
                chosen,
                methods=tuple(dict.fromkeys(["plain", *(it for it in methods if not is_ablation(it))])),
                ablations=tuple(dict.fromkeys(it for it in methods if is_ablation(it))),
            )
        if seeds is not None:
            if min(seeds) < 0:
                raise ConfigError(f"--seeds: expected 0 or more, found {min(seeds)}")
            chosen = replace(chosen, seeds=tuple(dict.fromkeys(seeds)))
        for name, count in (("--records", records), ("--limit", limit)):
            if count is not None and count < 1:
                raise ConfigError(f"{name}: expected at least 1, found {count}")
        chosen = replace(chosen, records=records or chosen.records, questions=limit or chosen.questions)
        ordered = tuple(part for part in PARTS if part in parts)
        return cls(out, chosen, ordered, tuple(dict.fromkeys(tasks)), model, data_root)


def is_ablation(method: str) -> bool:
    """Whether a method is there to show what its matrices do to rounding."""
    return method == "gaussian" or method.startswith("conditioned(")
