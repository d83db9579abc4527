"""What is asked for: a preset, and what the user would have otherwise. Checked before anything is computed.

Then every cell that it takes, in the order in which they are done: a cell comes after those that it builds on. The
tasks' files are in a local folder, or in a data set on the hub that has the same layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from obfuscatune.errors import ConfigError, DataError
from obfuscatune.reproduction.accuracy import Study
from obfuscatune.reproduction.cells import Cell
from obfuscatune.reproduction.costs import PROFILES, SHAPES, obfuscation_cell, share_cell, slowdown_cell
from obfuscatune.reproduction.error import ErrorStudy
from obfuscatune.reproduction.opening import Opening, Subject
from obfuscatune.reproduction.presets import ABLATIONS, Preset, find_method, find_preset
from obfuscatune.training.storage import RunDirectory
from obfuscatune.training.tasks import find_task


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


def plan_cells(request: Request, opening: Opening, out: RunDirectory) -> list[Cell]:
    """All cells, done or not.

    Raises:
        ConfigError, DataError, ModelFileError: something that they need is not there.
    """
    preset, cells = request.preset, list[Cell]()
    if {"accuracy", "error"} & set(request.parts):
        subject = Subject.find(request.model)
        if "accuracy" in request.parts:
            data = find_data(request.data_root, request.tasks)
            cells += _accuracy(Study(subject, opening, data, preset, out), request.tasks)
        if "error" in request.parts:
            cells += _error(ErrorStudy(subject, opening, preset))
    if "share" in request.parts:
        cells += [share_cell(shape) for shape in SHAPES]
    if "slowdown" in request.parts:
        cells += [slowdown_cell(preset, shape, profile) for shape in preset.slowdown for profile in PROFILES]
    if "obfuscate" in request.parts:
        cells += [obfuscation_cell(shape, profile) for shape in preset.obfuscate for profile in PROFILES]
    return cells


def _accuracy(study: Study, tasks: tuple[str, ...]) -> Iterator[Cell]:
    """Seed by seed, so that a run that is cut short has whole tables of fewer seeds."""
    preset = study.preset
    ablation_tasks = [task for task in tasks if task in preset.ablation_tasks]
    for seed in preset.seeds:
        for task in tasks:
            yield from (study.tuned(task, method, seed) for method in preset.methods)
    if preset.untuned:
        for task in tasks:
            yield from (study.untuned(task, method) for method in preset.methods)
    for seed in preset.seeds[: preset.ablation_seeds]:
        for task in ablation_tasks:
            yield from (study.tuned(task, method, seed) for method in preset.ablations)
            plain = study.tuned(task, "plain", seed)
            for method in _error_methods(preset):
                yield from (study.rounded(plain, method, dtype) for dtype in preset.sixteen_bits)


def _error(study: ErrorStudy) -> Iterator[Cell]:
    """The cells for the error of the model's output under every condition number; about a minute each."""
    methods = _error_methods(study.preset)
    for method in dict.fromkeys((*methods, *ABLATIONS[1:])):
        yield study.of_subject(method)
        if method in methods:
            yield from (study.of_shape(shape, method) for shape in study.preset.error_shapes)


def _error_methods(preset: Preset) -> tuple[str, ...]:
    """All but `enclave`, which computes what `plain` computes."""
    return tuple(method for method in (*preset.methods, *preset.ablations) if method != "enclave")
