"""What `obfuscatune bench` keeps: one name, and a file of each kind under it."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from obfuscatune.tuning.storage import RunDirectory


def result_name(what: str, shape: str | None = None, layers: int | None = None, *parts: str) -> str:
    """`2026-01-31-step-gpt2-4-layers-private`; what a file cannot be called, in a path or in knobs, becomes a dash."""
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    named = [] if shape is None else [shape]
    depth = [] if layers is None else [f"{layers}-layers"]
    return re.sub(r"[^\w.()-]+", "-", "-".join([day, what, *named, *depth, *parts]))


def keep(folder: Path, name: str, document: dict[str, Any], markdown: str, svg: str | None = None) -> Path:
    """Write all of them; the JSON file's path.

    Raises:
        StorageError: the folder cannot be written to.
    """
    path = folder / f"{name}.json"
    files = {".json": json.dumps(document, indent=1) + "\n", ".md": markdown}
    if svg is not None:
        files |= {".md": f"{markdown}\n![the same as a picture]({name}.svg)\n", ".svg": svg}
    directory = RunDirectory(folder)
    for suffix, text in files.items():
        directory.write_file(path.with_suffix(suffix).name, text.encode())
    return path
