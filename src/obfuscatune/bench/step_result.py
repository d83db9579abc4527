"""What `bench step`, `forward` and `decode` found: medians, ratios, where the time went, and what limits it."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from obfuscatune.bench.link import LinkSettings
from obfuscatune.bench.measures import SEND, WAIT, Limits
from obfuscatune.report.charts import Bar, Bars
from obfuscatune.report.page import format_bytes, markdown_table

PLAIN = "plain"
WORKER = "the worker computes"
LINK = "link: send, wake up, idle"
QUIET_SPREAD = 1.5
"""The slowest round over the fastest, beyond which a result says that other work may have run beside it."""
WORK = {"step": "LoRA step", "forward": "forward pass", "decode": "16 tokens a stream"}


@dataclass(frozen=True)
class Side:
    """The answers of one process (`bench_process.py`), in each counted round and afterwards."""

    rounds: list[dict[str, Any]] = field(repr=False)
    spans: dict[str, float] = field(repr=False)
    """Seconds by category, of one round under the profiler."""
    products: dict[str, int] = field(repr=False)
    """Operations and bytes of the products of one round; in this process, and by its worker."""

    @property
    def seconds(self) -> float:
        """Median time of a round."""
        return self.median("seconds")

    @property
    def flops(self) -> int:
        """Floating-point operations of all products of a round, by enclave and worker."""
        return self.products["flops"] + self.products.get("worker_flops", 0)

    def median(self, name: str) -> float:
        """Median over rounds of the answer `name`; 0 if the process does not answer it."""
        return float(statistics.median(answer.get(name, 0.0) for answer in self.rounds))

    @property
    def slowest_over_fastest(self) -> float:
        """Time of the slowest round relative to the fastest."""
        seconds = [float(answer["seconds"]) for answer in self.rounds]
        return max(seconds) / min(seconds)

    def breakdown(self) -> dict[str, float]:
        """Where a median round goes, in seconds; adds up to it.

        Waiting, and how long the worker computed, were clocked in every round. Everything else is shared out as in the
        round under the profiler, which makes small operations look a little larger than they are. A worker may begin
        while the enclave still sends, so sending and waiting are one: what the worker did not compute in is the link's.
        """
        waiting = min(self.median("waiting_seconds"), self.seconds)
        rest = {name: seconds for name, seconds in self.spans.items() if name != WAIT}
        scale = (self.seconds - waiting) / sum(rest.values())
        parts = {name: seconds * scale for name, seconds in rest.items()}
        linked = waiting + parts.pop(SEND, 0.0)
        if linked:
            computing = min(self.median("worker_seconds"), linked)
            parts |= {WORKER: computing, LINK: linked - computing}
        return dict(sorted(parts.items(), key=lambda part: -part[1]))

    def least_seconds(self, limits: Limits) -> float:
        """The least that a round can take on this machine: its products at full speed, and what crosses once each way.

        What crosses is read, rotated and mixed, and written; and the same on the way back.
        """
        read = self.products["bytes"] + self.products.get("worker_bytes", 0)
        return limits.least_seconds(self.flops, read) + limits.passing_seconds(2 * self.median("bytes"))

    def as_json(self, limits: Limits) -> dict[str, Any]:
        """Everything, for the file."""
        last = self.rounds[-1]
        peaks = {"own": last["peak_bytes"], "worker": last.get("worker_peak_bytes")}
        return {
            "seconds": self.seconds,
            "breakdown_seconds": self.breakdown(),
            "worker_seconds": self.median("worker_seconds"),
            "products": self.products,
            "least_seconds": self.least_seconds(limits),
            "peak_bytes": {name: peak for name, peak in peaks.items() if peak is not None},
            "rounds": self.rounds,
        }


@dataclass(frozen=True)
class StepResult:
    """What was measured; seconds and bytes."""

    bench: dict[str, Any]
    """The settings of the `StepBench`, with the shape's name."""
    plain_waiting: str
    """How OpenMP's threads wait in the plain process."""
    plain: Side
    protected: dict[str, Side]
    """By profile."""
    limits: Limits
    environment: dict[str, str]

    def ratios(self, profile: str) -> list[float]:
        """Protected over plain, round by round: what drifts with the machine cancels."""
        pairs = zip(self.plain.rounds, self.protected[profile].rounds, strict=True)
        return [b["seconds"] / a["seconds"] for a, b in pairs]

    def ratio(self, profile: str) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios(profile))

    def mean_ratio(self, profile: str) -> float:
        """Over all rounds together: with it counts what is not done in each, as the renewal of secrets."""
        both = (self.protected[profile], self.plain)
        over, under = (sum(float(answer["seconds"]) for answer in side.rounds) for side in both)
        return over / under

    def difference(self, profile: str) -> float:
        """Largest difference between what both sides computed in equal rounds: of a step the loss, in nats."""
        pairs = zip(self.plain.rounds, self.protected[profile].rounds, strict=True)
        return max(abs(float(a["result"] - b["result"])) for a, b in pairs)

    def as_json(self) -> dict[str, Any]:
        """Everything, for the file."""
        return {
            "bench": self.bench,
            "limits": asdict(self.limits),
            "plain": {"waiting": self.plain_waiting, **self.plain.as_json(self.limits)},
            "protected": {
                profile: {
                    "ratio": self.ratio(profile),
                    "ratios": self.ratios(profile),
                    "mean_ratio": self.mean_ratio(profile),
                    "difference": self.difference(profile),
                    "crossings": int(side.median("crossings")),
                    "bytes": int(side.median("bytes")),
                    **side.as_json(self.limits),
                }
                for profile, side in self.protected.items()
            },
            "environment": self.environment,
        }

    @property
    def sides(self) -> dict[str, Side]:
        """Plain, and each profile."""
        return {PLAIN: self.plain} | self.protected

    def picture(self) -> Bars:
        """One bar for each side, stacked by where its time goes; a line where the least possible time lies."""
        parts = [side.breakdown() for side in self.sides.values()]
        categories = dict.fromkeys(category for part in reversed(parts) for category in part)
        return Bars(
            "Where the time goes",
            list(self.sides),
            {name: [Bar(part[name]) if name in part else None for part in parts] for name in categories},
            y_label="seconds",
            stacked=True,
            least=("least possible", [side.least_seconds(self.limits) for side in self.sides.values()]),
        )

    def as_markdown(self) -> str:
        """What was measured, a row for each side, and where its time went."""
        b = self.bench
        depth = "all" if b["layers"] is None else b["layers"]
        parts = (
            f"{WORK[b['work']]}, {b['shape']} ({depth} layers), batch {b['batch']} x {b['length']}, "
            f"{b['threads']} threads, float32; link: {LinkSettings(**b['link'])}; medians of {b['rounds']} rounds; "
            f"plain with OpenMP waiting: {self.plain_waiting}.",
            self._times(),
            self._disturbed(),
            self._breakdown(),
            f"Measured on the spot, plain torch: {self.limits.gflops:.0f} GFLOP/s in a product, "
            f"{self.limits.copied_gbytes:.1f} GB/s read and written by a copy, {self.limits.read_gbytes:.1f} GB/s read "
            "by a sum.",
            self._roofline(),
        )
        return "\n\n".join(part for part in parts if part) + "\n"

    def _times(self) -> str:
        columns = ["", "seconds", "ratio", "round by round", "mean", "crossings", "bytes", "difference"]
        columns += ["peak, own", "peak, worker"]
        plain = (PLAIN, f"{self.plain.seconds:.3f}", *[""] * 6, format_bytes(self.plain.rounds[-1]["peak_bytes"]), "")
        return markdown_table(columns, [plain, *map(self._row, self.protected)])

    def _row(self, profile: str) -> tuple[str, ...]:
        side, ratios = self.protected[profile], self.ratios(profile)
        last = side.rounds[-1]
        return (
            *(f"`{profile}`", f"{side.seconds:.3f}", f"**{self.ratio(profile):.2f}**"),
            *(f"{min(ratios):.2f} to {max(ratios):.2f}", f"{self.mean_ratio(profile):.2f}"),
            *(f"{side.median('crossings'):.0f}", format_bytes(side.median("bytes")), f"{self.difference(profile):.1e}"),
            *(format_bytes(last["peak_bytes"]), format_bytes(last.get("worker_peak_bytes", 0))),
        )

    def _disturbed(self) -> str:
        """A warning where rounds of one side took so differently long that something else must have been at work."""
        worst = max(self.sides, key=lambda name: self.sides[name].slowest_over_fastest)
        spread = self.sides[worst].slowest_over_fastest
        if spread <= QUIET_SPREAD:
            return ""
        return f"**Not an idle machine**: the slowest round of {worst} took {spread:.1f} times the fastest."

    def _breakdown(self) -> str:
        parts = [side.breakdown() for side in self.sides.values()]
        rows = [
            (category, *(_share(part[category], part) if category in part else "" for part in parts))
            for category in dict.fromkeys(category for part in reversed(parts) for category in part)
        ]
        rows.append(("in all", *(f"{sum(part.values()):.3f}" for part in parts)))
        return markdown_table(("where it goes, seconds", PLAIN, *map("`{}`".format, self.protected)), rows)

    def _roofline(self) -> str:
        columns = ["", "GFLOP in products", "of them by the worker", "worker's GFLOP/s", "least possible seconds"]
        rows = []
        for name, side in self.sides.items():
            by_worker, busy = side.products.get("worker_flops", 0), side.median("worker_seconds")
            worker = (f"{by_worker / 1e9:.1f}", f"{by_worker / busy / 1e9:.0f}") if busy else ("", "")
            least = side.least_seconds(self.limits)
            shown = name if side is self.plain else f"`{name}`"
            rows.append((shown, f"{side.flops / 1e9:.1f}", *worker, f"{least:.3f}", f"{least / side.seconds:.0%}"))
        return markdown_table([*columns, "reached"], rows)


def _share(seconds: float, whole: dict[str, float]) -> str:
    return f"{seconds:.3f}, {seconds / sum(whole.values()):.0%}"
