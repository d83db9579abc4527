"""`bench rotation`: rotation and mixing by torch and by the compiled kernels, beside the limits of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from obfuscatune.backend import find_device
from obfuscatune.bench.measures import measure_limits, settled_seconds
from obfuscatune.bench.processes import Progress
from obfuscatune.enclave import kernels
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixing import KroneckerMixer, KroneckerMixing
from obfuscatune.enclave.transforms.structured import StructuredTransform
from obfuscatune.errors import ConfigError
from obfuscatune.native import SWITCH
from obfuscatune.report.page import environment, markdown_table

DIMS = (768, 1024, 1280, 1600, 2304, 3072, 4800, 5120, 6400)
"""Widths of the layers of GPT-2 small to XL."""
ROWS = (1, 8, 32, 512, 4096)
SHIELD_ROWS = 16
PAIRS = 6
"""Matrices that are worked on in turn: together they are more than a core's own caches hold."""
_LEAST_SECONDS = 0.05
"""For each measurement."""


@dataclass(frozen=True)
class RotationRow:
    """One operation on x (rows, dim) in float32; medians."""

    what: str
    rows: int
    dim: int
    torch_seconds: float
    kernel_seconds: float
    kernel_gflops: float
    """10⁹ floating-point operations a second, of the two small products."""
    kernel_gbytes: float
    """10⁹ bytes a second of x read once and the result written once."""


class _Case(NamedTuple):
    by_torch: Callable[[int], object]
    by_kernel: Callable[[int], object]
    operations: int
    rows_passed: int
    """Read, and written."""


@dataclass(frozen=True)
class RotationBench:
    """What is measured."""

    dims: tuple[int, ...] = DIMS
    rows: tuple[int, ...] = ROWS
    threads: int = 2
    device: str = "cpu"
    """Where x lies: cpu, or cuda:N."""

    def run(self, progress: Progress) -> RotationResult:
        """Measure; half a minute with the defaults.

        Raises:
            ConfigError: there is no such device, or there are no kernels for it.
        """
        if kernels.kernels_for(torch.empty(512, 512, device=self._there)) is kernels.REFERENCE:
            if self._there.type == "cuda":
                raise ConfigError("no kernels for a GPU here: install triton")
            raise ConfigError(
                f"no native kernels here: install with a C++ compiler, on Linux, and do not set {SWITCH}=0"
            )
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.no_grad():
                limits = measure_limits(device=self._there)
                gflops, gbytes = limits.gflops, limits.copied_gbytes
                progress(f"this machine: {gflops:.0f} GFLOP/s in a product, {gbytes:.0f} GB/s in a copy")
                rows = [row for n in self.rows for dim in self.dims for row in self._measured(n, dim, progress)]
        finally:
            torch.set_num_threads(before)
        return RotationResult(self, gflops, gbytes, rows, environment(self.threads))

    @property
    def _there(self) -> torch.device:
        return find_device(self.device, f"--device {self.device}")

    def _measured(self, n: int, dim: int, progress: Progress) -> list[RotationRow]:
        stream = SecretStream.fresh()
        R = StructuredTransform(dim, stream)
        xs = [torch.randn(n, dim, device=self._there) for _ in range(PAIRS)]
        per_number = 2 * sum(side for pair in R._pairs for side in (pair[0].shape[0], pair[1].shape[0]))
        there, back = (R._rotation(torch.float32, self._there, undo=undo) for undo in (False, True))
        by_torch, operations = kernels.REFERENCE, n * dim * per_number
        cases: dict[str, _Case] = {
            "rotate": _Case(lambda i: by_torch.rotate(xs[i], there), lambda i: R.apply(xs[i]), operations, 2 * n),
            "undo rotation": _Case(
                lambda i: by_torch.rotate(xs[i], back), lambda i: R.inverse(xs[i]), operations, 2 * n
            ),
        }
        A = KroneckerMixer(SHIELD_ROWS, stream).draw(n, dim)
        if isinstance(A, KroneckerMixing):  # few rows are mixed by one product of torch's, and by no kernel
            cases |= self._mixing_cases(A, xs)
        rows = []
        for what, it in cases.items():
            slow, fast = (_median(work, self._there) for work in (it.by_torch, it.by_kernel))
            size = 4 * dim * it.rows_passed
            rows.append(RotationRow(what, n, dim, slow, fast, it.operations / fast / 1e9, size / fast / 1e9))
        progress(f"{n} x {dim}: " + ", ".join(f"{r.what} {r.torch_seconds / r.kernel_seconds:.1f}x" for r in rows))
        return rows

    def _mixing_cases(self, A: KroneckerMixing, xs: list[Tensor]) -> dict[str, _Case]:
        n, dim = xs[0].shape
        ys = [torch.randn(A.rows, dim, device=self._there) for _ in range(PAIRS)]
        shield = torch.randn(A.rows - n, dim)
        by_torch, by_kernel = kernels.REFERENCE, kernels.kernels_for(xs[0])
        operations = A.rows * dim * 2 * sum(Q.shape[0] for Q in (A._A.Q_a, A._A.Q_b) if Q.shape[0] > 1)
        return {
            "mix": _Case(
                lambda i: by_torch.mix(xs[i], shield, A._A, ys[i]),
                lambda i: by_kernel.mix(xs[i], shield, A._A, ys[i]),
                operations,
                n + A.rows,
            ),
            "undo mixing": _Case(
                lambda i: by_torch.unmix(ys[i], A._A), lambda i: by_kernel.unmix(ys[i], A._A), operations, n + A.rows
            ),
        }


@dataclass(frozen=True)
class RotationResult:
    """What was measured."""

    bench: RotationBench
    machine_gflops: float
    """A product of torch's, 1536 x 1536, float32, on the device."""
    machine_gbytes: float
    """Bytes read and written by a copy of 256 MiB."""
    rows: list[RotationRow]
    environment: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Everything, for the file."""
        return asdict(self)

    def as_markdown(self) -> str:
        """One table."""
        about = (
            f"float32, {self.bench.threads} threads, on {self.bench.device}. There: {self.machine_gflops:.0f} GFLOP/s "
            f"in a product, {self.machine_gbytes:.0f} GB/s in a copy."
        )
        columns = ("operation", "rows", "width", "torch, ms", "kernel, ms", "faster", "GFLOP/s", "GB/s")
        rows = [
            (
                *(it.what, it.rows, it.dim, f"{it.torch_seconds * 1e3:.3f}", f"{it.kernel_seconds * 1e3:.3f}"),
                *(f"{it.torch_seconds / it.kernel_seconds:.1f}x", f"{it.kernel_gflops:.0f}", f"{it.kernel_gbytes:.1f}"),
            )
            for it in self.rows
        ]
        return f"{about}\n\n{markdown_table(columns, rows)}\n"


def _median(work: Callable[[int], object], device: torch.device) -> float:
    """Seconds of one call, each with the next of the matrices."""
    for i in range(PAIRS):
        work(i)
    turns = cycle(range(PAIRS))
    return settled_seconds(lambda: work(next(turns)), device, repeats=PAIRS, least_seconds=_LEAST_SECONDS)
