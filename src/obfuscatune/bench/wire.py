"""`bench wire`: how long rows take to a worker and their products back, by each way there is on one host.

A worker multiplies rows by a small matrix. What it took to multiply is on its clock and is taken off; what remains is
the link: headers, bytes, waking up the other process, and the check that what came back is finite. Between any two
rounds two other processes pass as many bytes to each other and back, by the same kind of socket and with nothing of
ours: what is left to be won is the ratio. Through shared memory only the messages pass a socket.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from obfuscatune.bench.clocked import ClockPage
from obfuscatune.bench.link import LOOPBACK, TCP, TLS, UNIX, free_port, identities, linked_worker
from obfuscatune.bench.ping_pong import PingPong, ping_pong
from obfuscatune.bench.processes import Progress, scratch_folder
from obfuscatune.enclave.client import WorkerClient
from obfuscatune.protocol.messages import HEADER_BYTES
from obfuscatune.protocol.payloads import Places
from obfuscatune.report.charts import Chart, Series
from obfuscatune.report.page import environment, format_bytes, markdown_table

ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
WIDTH = 256
LINKS = {"shared memory": UNIX, "unix socket": UNIX, "tcp": TCP, "tls": TLS}
"""What is measured, and the kind of link that it passes."""
_MATRIX_ID = bytes(15) + b"\x01"
_TICK_SECONDS = 1e-9
"""Shortest time of a round: the difference of two processes' clocks may come out negative."""
_LEAST_SHARE = 0.1
"""Least time for the bytes of the largest message, relative to the latency, for a bandwidth to be stated."""
_LEAST_ROUNDS, _MOST_ROUNDS = 10, 1000
_MOST_SECONDS = 0.5
"""Longest measurement for one number of rows on one link."""


@dataclass(frozen=True)
class WireRow:
    """Sending `rows` rows and receiving their product. Times are medians without the worker's computing time."""

    link: str
    rows: int
    nbytes: int
    """Bytes in both directions together."""
    seconds: float
    slow_seconds: float
    """The 90th percentile."""
    computing_seconds: float
    bare_seconds: float
    """Time of a bare ping-pong of the same bytes, measured in between."""

    @property
    def ratio(self) -> float:
        """Time relative to a bare ping-pong."""
        return self.seconds / self.bare_seconds

    @property
    def gbytes(self) -> float:
        """10⁹ bytes per second, both directions together."""
        return self.nbytes / self.seconds / 1e9


@dataclass(frozen=True)
class WireBench:
    """What is measured: rows of `width` float32 numbers, times a square matrix."""

    links: tuple[str, ...] = tuple(LINKS)
    rows: tuple[int, ...] = ROWS
    width: int = WIDTH
    threads: int = 2

    def run(self, progress: Progress) -> WireResult:
        """Measure; some seconds for each link.

        Raises:
            WireError: a worker did not start, or was lost.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            rows = [row for link in self.links for row in self._measured(link, progress)]
        finally:
            torch.set_num_threads(before)
        return WireResult(self, rows, environment(self.threads))

    def _measured(self, name: str, progress: Progress) -> Iterator[WireRow]:
        with _opened(name, self.threads) as (link, clock, bare):
            matrix = torch.eye(self.width)
            link.store(_MATRIX_ID, lambda: matrix, shape=(self.width, self.width), dtype=matrix.dtype)
            for count in self.rows:
                payload = 4 * count * self.width
                there, back = (Places.BYTES, 0) if name == "shared memory" else (payload, payload)
                with bare.of(HEADER_BYTES + there, HEADER_BYTES + back) as play:
                    seconds, computing, played = self._timed(link, count, clock, name, play)
                row = WireRow(
                    name,
                    count,
                    2 * payload,
                    statistics.median(seconds),
                    sorted(seconds)[len(seconds) * 9 // 10],
                    computing,
                    statistics.median(played),
                )
                progress(f"{name}, {count} rows: {row.seconds * 1e6:.0f} µs, {row.ratio:.2f} times a bare ping-pong")
                yield row

    def _timed(
        self, link: WorkerClient, count: int, clock: ClockPage, name: str, play: Callable[[], float]
    ) -> tuple[list[float], float, list[float]]:
        """Seconds of each round without the worker's computing; the mean of that; and of each bare ping-pong."""
        rows = (
            link.allocate(count, self.width, torch.float32)
            if name == "shared memory"
            else torch.empty(count, self.width)
        )
        rows.normal_()
        link.multiply(_MATRIX_ID, rows, transpose=False)
        seconds: list[float] = []
        computing: list[float] = []
        played: list[float] = []
        while len(seconds) < _LEAST_ROUNDS or (len(seconds) < _MOST_ROUNDS and sum(seconds) < _MOST_SECONDS):
            computed, started = clock.totals, time.perf_counter()
            link.submit(_MATRIX_ID, rows, transpose=False, known_finite=True).result()
            seconds.append(time.perf_counter() - started)
            computing.append(clock.totals.since(computed).seconds)
            played.append(play())
        return (
            [max(s - c, _TICK_SECONDS) for s, c in zip(seconds, computing, strict=True)],
            statistics.mean(computing),
            played,
        )


class Fitted(NamedTuple):
    """A link as a line: seconds = latency + bytes / bandwidth."""

    latency_seconds: float
    gbytes: float | None
    """None where the largest message took hardly longer than the smallest."""

    def seconds(self, nbytes: float) -> float:
        """That a message of so many bytes takes, there and back."""
        return self.latency_seconds + (0.0 if self.gbytes is None else nbytes / self.gbytes / 1e9)


@dataclass(frozen=True)
class WireResult:
    """What was measured."""

    bench: WireBench
    rows: list[WireRow]
    environment: dict[str, str]

    def fitted(self, link: str) -> Fitted:
        """The line that comes nearest to all points of a link, each point's error counted in parts of it."""
        points = [(row.nbytes, row.seconds) for row in self.rows if row.link == link]
        nbytes, seconds = np.array(points).T
        lines = np.stack([1 / seconds, nbytes / seconds], axis=1)
        (latency, per_byte), *_ = np.linalg.lstsq(lines, np.ones(len(points)), rcond=None)
        tells = per_byte * nbytes.max() > _LEAST_SHARE * latency
        return Fitted(max(float(latency), 0.0), 1e-9 / float(per_byte) if tells else None)

    def as_json(self) -> dict[str, Any]:
        """Everything, for the file."""
        return {
            "bench": asdict(self.bench),
            "fitted": {link: self.fitted(link)._asdict() for link in self.bench.links},
            "rows": [asdict(row) | {"gbytes": row.gbytes, "ratio": row.ratio} for row in self.rows],
            "environment": self.environment,
        }

    def picture(self) -> Chart:
        """How long so many bytes take by each link, there and back; the fitted lines are thin."""
        series = []
        for index, link in enumerate(self.bench.links):
            points = tuple((float(row.nbytes), row.seconds) for row in self.rows if row.link == link)
            fitted = tuple((nbytes, self.fitted(link).seconds(nbytes)) for nbytes, _ in points)
            series.append(Series(link, points, marks=True, line="none", colour=index))
            series.append(Series("", fitted, line="thin", colour=index))
        return Chart("Time by size", series, "bytes, there and back", "seconds", log_x=True, log_y=True)

    def as_markdown(self) -> str:
        """The lines, and the points that they were fitted to."""
        fits = {link: self.fitted(link) for link in self.bench.links}
        lines = [
            (
                link,
                f"{it.latency_seconds * 1e6:.0f}",
                "" if it.gbytes is None else f"{it.gbytes:.2f}",
                f"{next(row.ratio for row in self.rows if row.link == link):.2f}",
            )
            for link, it in fits.items()
        ]
        points = []
        for count in self.bench.rows:
            own = {row.link: row for row in self.rows if row.rows == count}
            size = format_bytes(next(iter(own.values())).nbytes)
            points.append((count, size, *(_cell(own.get(link)) for link in self.bench.links)))
        parts = (
            f"Rows of {self.bench.width} float32 numbers to a worker on this host and their product back, "
            f"{self.bench.threads} threads; without the time in which the worker computed.",
            markdown_table(
                ("link", "latency, µs", "GB/s, there and back", "fewest rows, times a bare ping-pong"), lines
            ),
            markdown_table(("rows", "bytes", *(f"{link}, µs" for link in self.bench.links)), points),
        )
        return "\n\n".join(parts) + "\n"


def _cell(row: WireRow | None) -> str:
    if row is None:
        return ""
    median, slow, bare = (f"{seconds * 1e6:.0f}" for seconds in (row.seconds, row.slow_seconds, row.bare_seconds))
    return f"{median} (9 of 10: {slow}; bare: {bare})"


@contextmanager
def _opened(name: str, threads: int) -> Iterator[tuple[WorkerClient, ClockPage, PingPong]]:
    """A link of that kind, its worker's clock, and a process for a bare ping-pong."""
    kind = LINKS[name]
    with scratch_folder() as folder:
        beside = f"unix:{folder}/pong" if kind == UNIX else f"tcp:{LOOPBACK}:{free_port()}"
        own = identities(Path(folder))[0] if kind == TLS else None
        with (
            ping_pong(beside, None if own is None else (own.certificate, own.private_key)) as bare,
            linked_worker(kind, threads) as (link, _, clock),
        ):
            yield link, clock, bare
