"""Every cell that a request takes, in the order in which they are done: a cell comes after those that it builds on."""

from __future__ import annotations

from collections.abc import Iterator

from obfuscatune.reproduction.accuracy import Study
from obfuscatune.reproduction.cells import Cell
from obfuscatune.reproduction.error import ErrorStudy
from obfuscatune.reproduction.obfuscation import obfuscation_cell
from obfuscatune.reproduction.opening import Opening, Subject
from obfuscatune.reproduction.presets import ABLATIONS, Preset
from obfuscatune.reproduction.questions import find_data
from obfuscatune.reproduction.request import Request
from obfuscatune.reproduction.share import SHAPES, share_cell
from obfuscatune.reproduction.share import PROFILES
from obfuscatune.reproduction.slowdown import slowdown_cell
from obfuscatune.tuning.storage import RunDirectory


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
    """Of the model under every condition number: no tuning, no questions, a minute each."""
    methods = _error_methods(study.preset)
    for method in dict.fromkeys((*methods, *ABLATIONS[1:])):
        yield study.of_subject(method)
        if method in methods:
            yield from (study.of_shape(shape, method) for shape in study.preset.error_shapes)


def _error_methods(preset: Preset) -> tuple[str, ...]:
    """All but `enclave`, which computes what `plain` computes."""
    return tuple(method for method in (*preset.methods, *preset.ablations) if method != "enclave")
