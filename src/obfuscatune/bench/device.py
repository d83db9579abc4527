"""`bench device`: protected work with a device of this machine as the worker, beside plain work on that device.

For every dtype, profile and place of the enclave's own part: a plain and a protected model take turns, round by round.
On a machine with one GPU that GPU plays every part: what belongs to the enclave, the worker, and the mask worker. That
protects nothing, and is timed as it would be but for the parts' sharing one device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from obfuscatune.backend import Computer, find_device
from obfuscatune.bench.measures import settle
from obfuscatune.bench.processes import Progress
from obfuscatune.bench.workload import ALL_AHEAD, WORKLOADS, Workload, config_of, random_model, shape_name
from obfuscatune.enclave.client import DeviceClient
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.protect import protect
from obfuscatune.protocol.addresses import DeviceAddress
from obfuscatune.report.page import environment, format_bytes, markdown_table

ANOTHER = 999
"""A number that no device has: the mask worker's link to the same device goes by it."""


@dataclass(frozen=True)
class DeviceRow:
    """One comparison. Seconds are medians over rounds."""

    dtype: str
    profile: str
    enclave: str
    plain_seconds: float
    seconds: float
    ratio: float
    """Median of the ratios, round by round."""
    ratios: list[float]
    difference: float | None
    """The largest between what both computed in equal rounds; None where they drew dropout on other kinds of device."""
    crossings: int
    bytes: int
    """Of a round, up and down the bus."""
    peak_bytes: int
    """Of memory on the device, both models together; 0 on the CPU."""


@dataclass(frozen=True)
class DeviceResult:
    """All comparisons, and where they were made."""

    bench: dict[str, Any]
    rows: tuple[DeviceRow, ...]
    environment: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Everything, for the file."""
        return {"bench": self.bench, "rows": [asdict(row) for row in self.rows], "environment": self.environment}

    def as_markdown(self) -> str:
        """A row for each comparison."""
        b = self.bench
        depth = "all" if b["layers"] is None else b["layers"]
        about = (
            f"{b['work']}, {b['shape']} ({depth} layers), batch {b['batch']} x {b['length']}; medians of {b['rounds']} "
            f"rounds; worker and plain on {b['worker']} ({self.environment['device']})."
        )
        columns = ["dtype", "profile", "enclave on", "plain, s", "protected, s", "ratio", "round by round", "requests"]
        rows = [
            (
                *(it.dtype, f"`{it.profile}`", it.enclave, f"{it.plain_seconds:.4f}", f"{it.seconds:.4f}"),
                *(f"**{it.ratio:.2f}**", f"{min(it.ratios):.2f} to {max(it.ratios):.2f}", it.crossings),
                *(format_bytes(it.bytes), "" if it.difference is None else f"{it.difference:.1e}"),
                format_bytes(it.peak_bytes),
            )
            for it in self.rows
        ]
        table = markdown_table([*columns, "bus", "difference", "device memory"], rows, text_columns=3)
        return f"{about}\n\n{table}\n"


@dataclass(frozen=True)
class DeviceBench:
    """What is compared: every profile in every dtype, with the enclave's own part in every place."""

    worker: DeviceAddress
    enclave_devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = ("float32",)
    profiles: tuple[str, ...] = ("private",)
    work: str = "step"
    """A key of `WORKLOADS`."""
    shape: str = "gpt2"
    layers: int | None = None
    batch: int = 2
    length: int = 256
    rounds: int = 7
    warmup: int = 2

    def run(self, progress: Progress) -> DeviceResult:
        """Measure.

        Raises:
            ConfigError: this machine has no such device.
            QuotaExceeded: the device has no room for the models.
        """
        device = find_device(self.worker.device, str(self.worker))
        for name in self.enclave_devices:
            find_device(name, f"--enclave-device {name}")
        rows = []
        for dtype, profile, enclave in product(self.dtypes, self.profiles, self.enclave_devices):
            rows.append(self._compared(device, dtype, profile, enclave))
            progress(f"{dtype}, {profile}, enclave on {enclave}: {rows[-1].ratio:.2f} times plain")
        settings = asdict(self) | {"worker": str(self.worker), "shape": shape_name(self.shape)}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's processor"
        return DeviceResult(settings, tuple(rows), environment() | {"device": name})

    def _model(self, dtype: str) -> Any:
        return random_model(config_of(self.shape, self.layers)).to(getattr(torch, dtype))

    def _compared(self, device: torch.device, dtype: str, profile: str, enclave: str) -> DeviceRow:
        plain = WORKLOADS[self.work](self._model(dtype).to(device), self.batch, self.length)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with self._protected(device, dtype, profile, enclave) as (work, protection):
            pairs = []
            stats = protection.stats.snapshot()
            for number in range(self.warmup + self.rounds):
                if number == self.warmup:
                    stats = protection.stats.snapshot()
                stocked = nullcontext() if protection.masks is None else protection.masks.stocked(work.requests_alike)
                with stocked:
                    pairs.append((_timed(plain, device, number), _timed(work, device, number)))
            crossed = protection.stats.since(stats)
        alike = torch.device(enclave).type == device.type or self.work != "step"
        counted = pairs[self.warmup :]
        ratios = [ours[0] / theirs[0] for theirs, ours in counted]
        return DeviceRow(
            dtype,
            profile,
            enclave,
            statistics.median(theirs[0] for theirs, _ in counted),
            statistics.median(ours[0] for _, ours in counted),
            statistics.median(ratios),
            ratios,
            max(abs(theirs[1] - ours[1]) for theirs, ours in pairs) if alike else None,
            crossed.crossings // self.rounds,
            (crossed.bytes_sent + crossed.bytes_received) // self.rounds,
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        )

    @contextmanager
    def _protected(
        self, device: torch.device, dtype: str, profile: str, enclave: str
    ) -> Iterator[tuple[Workload, Any]]:
        """The protected model's work. Its own part is moved by hand: `protect` lets no worker have it."""
        with ExitStack() as stack:
            masks = None
            link = stack.enter_context(DeviceClient(Computer(device), self.worker))
            if resolve(profile).masks:
                another = DeviceAddress(self.worker.kind, ANOTHER)
                masks = stack.enter_context(DeviceClient(Computer(device), another))
            model = protect(self._model(dtype), link, profile, base="closed", mask_worker=masks, masking=ALL_AHEAD)
            stack.callback(model.close)
            model.to(enclave)
            yield WORKLOADS[self.work](model, self.batch, self.length), model.protection


def _timed(work: Workload, device: torch.device, seed: int) -> tuple[float, float]:
    """Seconds of one call, with all that it left to be computed; and its result. Dropout is drawn from that seed."""
    work.prepare()
    torch.manual_seed(seed)
    settle(device)
    started = time.perf_counter()
    result = work()
    settle(device)
    return time.perf_counter() - started, result
