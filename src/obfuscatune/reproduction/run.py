"""The whole reproduction: whatever cell is not done yet, then the report.

<out>/cells/    a file for each cell that is done
<out>/runs/     the run directory of each fine-tuning: recipe, metrics, adapter
<out>/report.*  the tables (documents.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.reproduction.cells import CellStore, Measured, Meter, Watch
from obfuscatune.reproduction.compared import Check, check
from obfuscatune.reproduction.documents import to_csv, to_html, to_markdown
from obfuscatune.reproduction.opening import Opening
from obfuscatune.reproduction.presets import TASKS
from obfuscatune.reproduction.request import Request, plan_cells
from obfuscatune.training.storage import RunDirectory


@dataclass(frozen=True)
class Reproduction:
    """What came of it. `report` is the HTML page; beside it lie the Markdown and the CSV files."""

    cells: Sequence[Measured]
    checks: Sequence[Check]
    report: Path
    markdown: Path


class _Unseen:
    """A meter that nobody looks at."""

    def expect(self, total: int) -> None:
        """Nothing."""

    def advance(self, done: int, note: str = "") -> None:
        """Nothing."""


@contextmanager
def unwatched(_what: str) -> Iterator[Meter]:
    """A `Watch` for callers that want no progress."""
    yield _Unseen()


def reproduce(
    out: str | Path,
    *,
    preset: str = "cpu",
    parts: Sequence[str] = ("accuracy", "error", "share"),
    tasks: Sequence[str] = TASKS,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    model: str | None = None,
    data_root: str | Path | None = None,
    records: int | None = None,
    limit: int | None = None,
    watch: Watch = unwatched,
) -> Reproduction:
    """Make the paper's tables anew. What a run before this one has finished in `out` is not done again.

    Args:
        out: folder for cells, runs and the report.
        preset: `paper`, `cpu`, `real` or `smoke`.
        parts: of accuracy, error, share, slowdown, obfuscate.
        tasks: of webqs, openbookqa, piqa, sciq.
        methods: in place of the preset's: plain, paper, private, enclave, gaussian, conditioned(KAPPA).
        seeds: in place of the preset's.
        model: a directory or a hub id; the embedded model if None.
        data_root: a folder, or a data set on the hub, with the tasks' files (docs/reproduce.md).
        records: training records of each task, in place of the preset's.
        limit: test questions of each task, in place of the preset's.
        watch: called with what is begun; gives a meter for as long as it lasts.

    Raises:
        ConfigError, DataError, ModelFileError: something asked for is unknown or not there.
        StorageError: the disk refused.
        WireError: the worker process failed; the next run goes on from there.

    Example:
        >>> obfuscatune.reproduce("out", preset="smoke", parts=["share"]).report
        PosixPath('out/report.html')
    """
    request = Request.resolve(
        Path(out),
        preset=preset,
        parts=parts,
        tasks=tasks,
        methods=methods,
        seeds=seeds,
        model=model,
        data_root=data_root,
        records=records,
        limit=limit,
    )
    directory = RunDirectory(request.out)
    with directory.locked(), ExitStack() as stack:
        store = CellStore(directory)
        with watch("reading models and questions"):
            cells = plan_cells(request, Opening(stack), directory)
        missing = store.missing(cells)
        for number, cell in enumerate(missing, start=len(cells) - len(missing) + 1):
            store.measure(cell, _numbered(watch, f"[{number}/{len(cells)}]"))
        measured = [found for cell in cells if (found := store.read(cell)) is not None]
        return _write(request, measured, directory)


def _numbered(watch: Watch, number: str) -> Watch:
    return lambda what: watch(f"{number} {what}")


def _write(request: Request, cells: Sequence[Measured], directory: RunDirectory) -> Reproduction:
    checks = check(cells)
    directory.write_file("report.md", to_markdown(request, cells, checks).encode())
    directory.write_file("report.html", to_html(request, cells, checks).encode())
    for name, text in to_csv(cells).items():
        directory.write_file(name, text.encode())
    return Reproduction(cells, checks, directory.root / "report.html", directory.root / "report.md")
