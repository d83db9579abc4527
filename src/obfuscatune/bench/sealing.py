"""`bench seal`: a bundle sealed and opened beside AES-GCM alone, on the same machine, in turn, in the same run.

AES-GCM alone is what one would do without bundles: one thread reads a file, encrypts it in pieces of 4 MiB and writes
one file; or reads that and decrypts it. A bundle is hashed besides, and worked on by all cores.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from obfuscatune.bench.processes import Progress, run_module
from obfuscatune.bench.sealing_process import WORKS
from obfuscatune.errors import StorageError
from obfuscatune.machine import cores
from obfuscatune.protocol.files import temporary_root
from obfuscatune.report.page import environment, format_bytes, markdown_table

BESIDE = {
    "seal": ("AES-GCM alone, encrypt a file", "AES-GCM alone, encrypt in memory"),
    "open": ("AES-GCM alone, decrypt a file", "AES-GCM alone, decrypt in memory"),
    "open into memory": ("AES-GCM alone, decrypt a file", "AES-GCM alone, decrypt in memory"),
}
_PIECE_BYTES = 2**24


@dataclass(frozen=True)
class SealBench:
    """What is measured: a file of random bytes, in a folder on the disk that is meant."""

    size: int = 2**31
    rounds: int = 3
    folder: Path | None = None
    """None takes the one for temporary files."""

    def run(self, progress: Progress) -> "SealResult":
        """Measure; a minute or two with 2 GiB.

        Raises:
            StorageError: the folder cannot be written, or has no room for three times the size.
            ConfigError: a process failed; what it said stands on stderr.
        """
        best: dict[str, Took] = {}
        try:
            with tempfile.TemporaryDirectory(prefix="bench-seal-", dir=self.folder or temporary_root()) as made:
                folder = Path(made)
                self._write_source(folder / "source")
                for number in range(self.rounds):
                    for work in WORKS:
                        took = _took(work, folder)
                        best[work] = min(took, best.get(work, took), key=lambda it: it.seconds)
                        progress(f"round {number + 1}: {work}: {self.size / took.seconds / 1e9:.2f} GB/s")
                    shutil.rmtree(folder / "bundle")
                    for name in "bundle.key", "sealed.bin", "copy.bin":
                        (folder / name).unlink()
        except OSError as error:
            raise StorageError(
                f"cannot measure in {self.folder or temporary_root()}: {error.strerror or error}"
            ) from error
        settings = {"size": self.size, "rounds": self.rounds, "threads": cores()}
        return SealResult(settings, best, environment(cores()))

    def _write_source(self, folder: Path) -> None:
        folder.mkdir()
        if shutil.disk_usage(folder).free < 3.5 * self.size:
            raise StorageError(f"{folder} has no room for three times {format_bytes(self.size)}: name another by --dir")
        with (folder / "weights.bin").open("wb") as file:
            for start in range(0, self.size, _PIECE_BYTES):
                file.write(os.urandom(min(_PIECE_BYTES, self.size - start)))


@dataclass(frozen=True)
class Took:
    """One piece of work, done once."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class SealResult:
    """The fastest round of each piece of work."""

    bench: Mapping[str, int]
    took: Mapping[str, Took]
    environment: dict[str, str]

    def speed(self, work: str) -> float:
        """Bytes of plain text a second."""
        return self.bench["size"] / self.took[work].seconds

    def share(self, work: str, beside: str) -> float:
        """How fast it is, over how fast the other is."""
        return self.speed(work) / self.speed(beside)

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        shares = {work: {it: self.share(work, it) for it in beside} for work, beside in BESIDE.items()}
        took = {work: asdict(it) for work, it in self.took.items()}
        return {"bench": dict(self.bench), "took": took, "shares": shares, "environment": self.environment}

    def as_markdown(self) -> str:
        """Speeds, shares and memory."""
        rows = [
            (
                work,
                f"{self.speed(work) / 1e9:.2f}",
                f"{it.cpu_seconds / self.bench['size'] * 1e9:.2f}",
                format_bytes(it.peak_bytes),
                *(f"{self.share(work, other):.2f}" for other in BESIDE.get(work, ())),
                *([] if work in BESIDE else ["", ""]),
            )
            for work, it in self.took.items()
        ]
        columns = ("work", "GB/s", "CPU s/GB", "peak memory", "over AES-GCM, file", "over AES-GCM, in memory")
        what = f"{format_bytes(self.bench['size'])}, fastest of {self.bench['rounds']} rounds"
        return f"{what}; bundles on {self.bench['threads']} threads, all else on one\n\n{markdown_table(columns, rows)}"


def _took(work: str, folder: Path) -> Took:
    os.sync()  # nothing that was written before goes to the disk while this is timed
    return Took(**run_module("obfuscatune.bench.sealing_process", work, str(folder)))
