"""What a model's configuration files say: `config.json`, `generation_config.json`.

The files are the provider's word, and no code of theirs is run: `auto_map` is dropped, `trust_remote_code` is False in
every call, and an attention or experts implementation that would fetch a kernel from the hub is refused. Nothing here
reads standard input.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from obfuscatune.wire.errors import ModelFileError

LONGEST_REASON = 300
"""Characters of an upstream error that are passed on; some list every architecture there is."""
ATTENTION = ("eager", "sdpa", "flex_attention")
"""Implementations of attention that run what is installed here; others may fetch a kernel from the hub."""
EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""Implementations of experts, with the same rule."""


def read_config(path: Path) -> PretrainedConfig:
    """The configuration in a directory, or in a file; the model's own code is never run.

    Raises:
        ModelFileError: there is none, it is not one that transformers knows, it needs code of the model's own or
            a kernel from the hub, or the weights are quantised.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelFileError(f"{path} holds no config.json, so it is no model in Hugging Face's layout")
    with blamed_on(file):
        written = json.loads(file.read_text("utf-8"))
    _refuse_what_runs_code(written, file)
    with blamed_on(file):
        return without_code(AutoConfig.from_pretrained(path, trust_remote_code=False))


def changed(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """A copy of a configuration with some attributes set, and without what would run a model's own code."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return without_code(config)


def without_code(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration, and those within it, stripped of what names code."""
    for part in _with_parts(config):
        for name in ("auto_map", "fusion_config"):  # what would replace classes by others
            vars(part).pop(name, None)
        if part._attn_implementation not in ATTENTION:
            part._attn_implementation_internal = None  # transformers chooses, among what is installed
    return config


def _with_parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            yield from _with_parts(part)


def _refuse_what_runs_code(written: Any, file: Path) -> None:
    """Refuse, by name, what a configuration asks for beyond numbers; `written` is its JSON or a part of it."""
    if isinstance(written, list):
        for part in written:
            _refuse_what_runs_code(part, file)
    if not isinstance(written, dict):
        return
    for name, value in written.items():
        kind = str(name).removeprefix("_").removesuffix("_internal")
        if kind == "attn_implementation":
            refuse_kernels(value, f"{file}: {name}", ModelFileError)
        elif kind == "experts_implementation":
            refuse_kernels(value, f"{file}: {name}", ModelFileError, among=EXPERTS)
        elif kind == "quantization_config" and value:
            raise ModelFileError(
                f"{file}: the weights are quantised, which protection cannot transform: load them whole"
            )
        else:
            _refuse_what_runs_code(value, file)


def refuse_kernels(value: Any, what: str, error: type[Exception], among: tuple[str, ...] | None = None) -> None:
    """Refuse an implementation that names a hub repository, or, where given, any but those `among` which are here.

    Args:
        value: of `attn_implementation` or `experts_implementation`: a name, or a dict of names by part of the model.
    """
    for name in value.values() if isinstance(value, dict) else [value]:
        if name is None:
            continue
        if not isinstance(name, str) or "/" in name or (among is not None and name not in among):
            raise error(
                f"{what} is {name!r}: an enclave fetches no kernel and runs no code that comes with a model; "
                f"expected {' or '.join(among or ATTENTION)}, or nothing"
            )


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """How the model is to generate, where the directory says so.

    Raises:
        ModelFileError: it says so in a way that cannot be read.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return None
    with blamed_on(path):
        return GenerationConfig.from_pretrained(directory)


@contextmanager
def blamed_on(file: Path | str) -> Iterator[None]:
    """Whatever transformers raises over a file's content, as one ModelFileError that names the file."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise ModelFileError(f"{file} cannot be used: {type(error).__name__}: {reason}") from error
