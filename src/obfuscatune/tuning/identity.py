"""What a run is made of: to resume it, all of this must be the same."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from obfuscatune.tuning.recipe import Recipe
from obfuscatune.wire.errors import ModelFileError

_SAMPLE_BYTES = 64 * 2**10

_NOT_INGREDIENTS = {
    *("model", "data", "eval", "out", "worker", "base"),
    *("checkpoint_every", "checkpoints_kept", "tensorboard", "logging_steps"),
    *("patience", "load_best"),
}
"""Fields that may change: where things lie (contents are compared); what leaves no trace in the result; what is
decided anew after each step, or at the end, from the losses so far."""
_LENGTH = {"epochs", "max_steps"}


def ingredients(recipe: Recipe, *, model: str, data: str, evaluation: str | None) -> Mapping[str, Any]:
    """The recipe's fields that shape the result, and the digests of model, data and eval records."""
    fields = recipe.model_dump(mode="json", exclude=_NOT_INGREDIENTS)
    return fields | {"model": model, "data": data, "eval": evaluation}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The ingredients in which a run differs from a checkpoint's. To be longer is no difference."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if _LENGTH.issuperset(keys) and _is_longer(before, now):
        return []
    return keys


def _is_longer(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run lasts as long as before, or longer. `max_steps` overrides `epochs`; the two are not compared."""
    by = "epochs" if before.get("max_steps") is None else "max_steps"
    if (before.get("max_steps") is None) != (now.get("max_steps") is None):
        return False
    return before.get(by) is not None and bool(now[by] >= before[by])


def model_fingerprint(model: Path | str) -> str:
    """SHA-256 over a model directory's file names, sizes, and the start, middle and end of each.

    Not the whole of each, for a large model takes minutes to read: enough to tell apart any two models, not
    to notice a forged one. A Hub name stands for itself.

    Raises:
        ModelFileError: a file cannot be read.
    """
    directory = Path(model)
    if not directory.is_dir():
        return str(model)
    total = hashlib.sha256()
    try:
        for path in sorted(directory.iterdir()):
            if path.is_file() and path.suffix in {".json", ".safetensors", ".model", ".jinja", ".txt"}:
                size = path.stat().st_size
                total.update(f"{path.name}/{size}/".encode())
                with path.open("rb") as file:
                    for start in (0, max(0, size // 2), max(0, size - _SAMPLE_BYTES)):
                        file.seek(start)
                        total.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ModelFileError(f"{directory}: cannot be read: {error.strerror or error}") from error
    return total.hexdigest()
