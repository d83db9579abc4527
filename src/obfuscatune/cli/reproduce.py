"""`obfuscatune reproduce`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from obfuscatune.cli import options, output
from obfuscatune.errors import ConfigError
from obfuscatune.option import Option

if TYPE_CHECKING:
    from obfuscatune.reproduction.run import Reproduction


def reproduce(
    out: Annotated[Path, Option("Folder for results and report.")] = Path("reproduce-out"),
    preset: Annotated[str, Option("paper: its recipe in full; cpu, real, smoke: scaled down.")] = "cpu",
    parts: Annotated[str, Option("Of accuracy, error, share, slowdown, obfuscate.")] = "accuracy,error,share",
    tasks: Annotated[str, Option("Of webqs, openbookqa, piqa, sciq.", unset="all")] = "webqs,openbookqa,piqa,sciq",
    methods: Annotated[
        str | None,
        Option(
            "Of plain, paper, private, guarded, enclave, gaussian, conditioned(KAPPA); plain comes always.",
            unset="the preset's",
        ),
    ] = None,
    seeds: Annotated[str | None, Option("As in 0,1,2.", unset="the preset's")] = None,
    model: options.Model = None,
    data_root: Annotated[str | None, Option("Folder, or data set on the Hub, with the tasks' files.")] = None,
    records: Annotated[int | None, Option("Training records of each task.", unset="the preset's")] = None,
    limit: Annotated[int | None, Option("Test questions of each task.", unset="the preset's")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make the paper's tables: accuracy, error, enclave's share, slowdown, time to obfuscate.

    Every cell is kept when it is done: run the command again after an interruption, or with more tasks, methods or
    seeds, and it does what is missing. Ends with a page, Markdown and CSV in --out. What the data root must
    hold, and what each table says: docs/reproduce.md.
    """
    from obfuscatune.reproduction.run import reproduce as run

    try:
        found = run(
            out,
            preset=preset,
            parts=_names(parts),
            tasks=_names(tasks),
            methods=None if methods is None else _names(methods),
            seeds=None if seeds is None else [_whole(seed) for seed in _names(seeds)],
            model=model,
            data_root=data_root,
            records=records,
            limit=limit,
            watch=output.progress,
        )
    except KeyboardInterrupt:
        output.notice("what is done is kept: the same command goes on from there")
        raise
    text = f"{found.markdown.read_text('utf-8')}\nreport: {found.report}"
    output.write_result(_document(found), text, as_json=as_json)


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--seeds: expected whole numbers, found {text!r}") from None


def _document(found: "Reproduction") -> dict[str, object]:
    return {
        "report": str(found.report),
        "checks": [vars(check) for check in found.checks],
        "cells": [
            {"kind": cell.kind, "name": cell.name, "settings": cell.settings, "result": cell.result}
            for cell in found.cells
        ],
    }
