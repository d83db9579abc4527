"""Where the tasks' files are: a local folder, or a data set on the hub that has the same layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from obfuscatune.tuning.tasks import find_task
from obfuscatune.wire.errors import ConfigError, DataError


def find_data(root: str | Path | None, tasks: Sequence[str]) -> Path:
    """A local folder that holds the files of all these tasks.

    Args:
        root: a folder, or the id of a data set on the hub, of which only these files are fetched.

    Raises:
        ConfigError: none was given, or no such task.
        DataError: a file is missing, or the hub gave nothing.
    """
    files = sorted({rows.file for name in tasks for rows in (find_task(name).train, find_task(name).test)})
    if root is None:
        raise ConfigError(
            f"the accuracy part asks questions: give --data-root, a folder (or a data set on the hub) with "
            f"{', '.join(files)} (docs/reproduce.md); the other parts need none: --parts error,share,slowdown"
        )
    folder = Path(root) if Path(root).is_dir() else _fetch(str(root), files)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise DataError(f"{root}: {', '.join(missing)} is missing; docs/reproduce.md says what each file holds")
    return folder


def _fetch(dataset: str, files: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(dataset, repo_type="dataset", allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{dataset!r} is neither a folder here nor a data set that the hub gave us ({type(error).__name__}): "
            "give a folder with the files of docs/reproduce.md"
        ) from error
