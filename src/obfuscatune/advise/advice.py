"""What to expect of a model on this machine with these workers, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from obfuscatune.advise.cost import Prediction, Speeds, Team, most_fed, predict, sharded
from obfuscatune.advise.enclave import Machine, ProductTimes, measure_machine, measure_optimizer, measure_others
from obfuscatune.advise.link import Link, RequestTimes, measure_link, measure_requests
from obfuscatune.advise.work import Kind, Work, count_work
from obfuscatune.backend.computer import has_units_for
from obfuscatune.enclave.client.interface import WorkerLink
from obfuscatune.enclave.profiles import Profile
from obfuscatune.report.page import environment, format_bytes, markdown_table

Progress = Callable[[str], None]
FLEETS = (1, 2, 4, 8, 16)
"""Numbers of workers that the table has, beside how many there are."""
WORTH = 0.9
"""A worker pays where the protected run takes less than this share of all in the enclave: a tenth is for errors."""
_DONE = {"step": "a LoRA step", "forward": "a forward pass", "decode": "a token of each stream"}


@dataclass(frozen=True)
class Gpu:
    """A confidential GPU, by the numbers that the user gives: nothing of it is measured."""

    tflops: float
    """10¹² operations a second, as its products reach them."""
    gbytes: float
    """10⁹ bytes a second of its memory."""

    def least_seconds(self, work: Work) -> float:
        """That all products of the plain run can take, if each weight is read once."""
        weights = work.parameters * work.dtype.itemsize
        return max(work.plain_flops / self.tflops / 1e12, weights / self.gbytes / 1e9)


@dataclass(frozen=True)
class Changes:
    """Speeds to reckon with in place of those that were measured."""

    worker_gflops: float | None = None
    link_gbytes: float | None = None
    latency_us: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """Those that are."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class WorkerAdvice:
    """One worker, and what to expect with it."""

    address: str
    link: Link
    requests: RequestTimes
    prediction: Prediction

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        one = self.prediction
        return {
            "address": self.address,
            "link": asdict(self.link),
            "requests": asdict(self.requests) | {"worker_gflops": self.requests.worker_gflops},
            "seconds": one.seconds,
            "ratio": one.ratio,
            "parts": one.parts,
            "enclave_seconds": one.own_seconds,
        }


@dataclass(frozen=True)
class Advice:
    """What was measured and predicted."""

    what: Mapping[str, Any]
    """The model, its work, profile and dtype."""
    work: Work
    machine: Machine
    plain_seconds: float
    inside: dict[str, float]
    """Seconds with everything in the enclave, by dtype of its products."""
    workers: list[WorkerAdvice]
    gpu: Gpu | None
    changes: Changes
    environment: dict[str, str]

    @property
    def predictions(self) -> list[Prediction]:
        """With each worker alone."""
        return [it.prediction for it in self.workers]

    @property
    def fed(self) -> int:
        """How many workers, these and others like them, this enclave keeps busy."""
        return most_fed(self.predictions)

    def teams(self) -> Iterator[tuple[int, Team]]:
        """Of one worker, of all, and of more."""
        for count in sorted({*FLEETS, len(self.workers)}):
            yield count, Team.of(self.predictions, count)

    @property
    def model_bytes(self) -> int:
        """Of all weights."""
        return self.work.parameters * self.work.dtype.itemsize

    @property
    def fits(self) -> bool:
        """Whether the whole model would fit into this machine's free memory."""
        return self.model_bytes <= self.machine.free_bytes

    def verdicts(self) -> list[str]:
        """What follows, in sentences."""
        return list(self._verdicts())

    def _verdicts(self) -> Iterator[str]:
        dtype, least = min(self.inside.items(), key=lambda item: item[1])
        if not self.fits:
            yield (
                f"The model's weights ({format_bytes(self.model_bytes)}) do not fit into this machine's free memory "
                f"({format_bytes(self.machine.free_bytes)}): without a worker it does not run here."
            )
        for it in self.workers:
            one = it.prediction
            limit, seconds = max(one.parts.items(), key=lambda part: part[1])
            yield (
                f"One stream with the worker at {it.address} {self._pays(one.seconds, least, dtype)}. The largest part "
                f"of it is {limit} ({seconds / one.seconds:.0%})."
            )
        if len(self.workers) > 1:
            together = sharded(self.predictions)
            yield (
                f"One stream with these {len(self.workers)} workers together, columns shared out, "
                f"{self._pays(together.seconds, least, dtype)}."
            )
        if self.workers:
            yield self._feeding(least, dtype)
        if self.gpu is not None:
            seconds = self.gpu.least_seconds(self.work)
            yield (
                f"A confidential GPU with the given {self.gpu.tflops:g} TFLOP/s and {self.gpu.gbytes:g} GB/s could not "
                f"take less than {seconds:.3g} s for the products; nothing of it was measured."
            )

    def _pays(self, seconds: float, least: float, dtype: str) -> str:
        """What is to be said of so many seconds, against those that everything in the enclave takes."""
        if not self.fits:
            return f"is what makes it possible: {seconds:.3g} s"
        pays = "pays" if seconds < WORTH * least else "does not pay"
        return f"{pays}: {seconds:.3g} s against {least:.3g} s with everything in the enclave in {dtype}"

    def _feeding(self, least: float, dtype: str) -> str:
        """How many workers are of use, and what comes of them."""
        fed = self.fed
        team = Team.of(self.predictions, fed)
        these = "such worker" if len(self.workers) == 1 else "worker, these and others like them,"
        streams = max(it.streams for it in team.members)
        return (
            f"This enclave feeds {fed} {these if fed == 1 else these.replace('worker', 'workers', 1)} at most, with "
            f"{max(streams, fed)} streams at a time; more are of no use, since {team.limit} is the limit then. That "
            f"{self._pays(team.streamed_seconds, least, dtype)}, for each."
        )

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        work, gpu = self.work, self.gpu
        return {
            "what": dict(self.what),
            "work": {
                "plain_flops": work.plain_flops,
                "enclave_flops": work.enclave_flops,
                "worker_flops": work.worker_flops,
                "requests": work.crossings,
                "bytes_up": work.bytes_up,
                "bytes_down": work.bytes_down,
                "tokens": work.tokens,
                "parameters": work.parameters,
                "worker_parameters": work.worker_parameters,
            },
            "machine": asdict(self.machine),
            "model_bytes": self.model_bytes,
            "fits": self.fits,
            "plain_seconds": self.plain_seconds,
            "inside_seconds": self.inside,
            "workers": [it.as_json() for it in self.workers],
            "fleets": [
                {
                    "workers": count,
                    "sharded_seconds": team.sharded_seconds,
                    "streamed_seconds": team.streamed_seconds,
                    "limit": team.limit,
                }
                for count, team in self.teams()
            ],
            "fed_workers": self.fed,
            "confidential_gpu": None if gpu is None else asdict(gpu) | {"least_seconds": gpu.least_seconds(work)},
            "changes": self.changes.given,
            "verdicts": self.verdicts(),
            "environment": self.environment,
        }

    def as_markdown(self) -> str:
        """What follows, and the tables that it follows from."""
        parts = [self._heading(), "\n".join(f"- {line}" for line in self.verdicts())]
        parts += [self._expected(), self._where(), self._fleets(), self._machine_table(), self._worker_table()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _heading(self) -> str:
        it = self.what
        changed = "".join(
            f" {name.replace('_', '-')} {value:g} is given." for name, value in self.changes.given.items()
        )
        return (
            f"{it['model']}, {_DONE[self.work.kind]}, batch {it['batch']} x {it['length']}, profile `{it['profile']}`, "
            f"{it['dtype']}, {it['threads']} threads.{changed}"
        )

    def _machine_table(self) -> str:
        m = self.machine
        columns = ["this enclave", *(f"{dtype}, GFLOP/s" for dtype in m.gflops), "read, GB/s", "copied, GB/s", "free"]
        row = [", ".join([f"{m.cores} cores", *m.units]), *(f"{speed:.0f}" for speed in m.gflops.values())]
        row += [f"{m.read_gbytes:.1f}", f"{m.copied_gbytes:.1f}", format_bytes(m.free_bytes)]
        return markdown_table(columns, [row])

    def _worker_table(self) -> str:
        columns = ["worker", "latency, µs", "up, GB/s", "down, GB/s", "its products, GFLOP/s"]
        columns += ["own part of a request, µs", "and GB/s"]
        rows = [
            (
                it.address,
                f"{it.link.latency_seconds * 1e6:.0f}",
                *(_gbytes(a_byte) for a_byte in (it.link.up_seconds_a_byte, it.link.down_seconds_a_byte)),
                f"{it.requests.worker_gflops:.1f}",
                f"{it.requests.own_seconds * 1e6:.0f}",
                _gbytes(it.requests.own_seconds_a_byte),
            )
            for it in self.workers
        ]
        return markdown_table(columns, rows)

    def _expected(self) -> str:
        rows = [("plain, here", f"{self.plain_seconds:.3g}", "", f"{self.work.tokens / self.plain_seconds:.1f}")]
        rows += [
            (f"all in the enclave, {dtype}", f"{seconds:.3g}", f"{seconds / self.plain_seconds:.2f}",
             f"{self.work.tokens / seconds:.1f}")
            for dtype, seconds in self.inside.items()
        ]  # fmt: skip
        rows += [
            (f"protected, {it.address}", f"{it.prediction.seconds:.3g}", f"**{it.prediction.ratio:.2f}**",
             f"{self.work.tokens / it.prediction.seconds:.1f}")
            for it in self.workers
        ]  # fmt: skip
        return markdown_table(["expected", "seconds", "ratio", "tokens/s"], rows)

    def _where(self) -> str:
        names = self.workers[0].prediction.parts if self.workers else {}
        rows = [
            (name, *(f"{it.prediction.parts[name]:.4f}, {it.prediction.parts[name] / it.prediction.seconds:.0%}"
                     for it in self.workers))
            for name in names
            if any(it.prediction.parts[name] for it in self.workers)
        ]  # fmt: skip
        return markdown_table(["where it goes, seconds", *(it.address for it in self.workers)], rows) if rows else ""

    def _fleets(self) -> str:
        rows = [
            (
                f"{count}{', these' if count == len(self.workers) else ''}",
                f"{team.sharded_seconds:.3g}",
                f"{team.streamed_seconds:.3g}",
                f"{self.work.tokens / team.streamed_seconds:.1f}",
                team.limit,
            )
            for count, team in self.teams()
        ]
        columns = ["workers", "one stream, columns shared out, s", "many streams, s each", "tokens/s", "limit"]
        return markdown_table(columns, rows)


def _gbytes(seconds_a_byte: float) -> str:
    return f"{1e-9 / seconds_a_byte:.2f}" if seconds_a_byte > 0 else "not measurable"


@dataclass(frozen=True)
class Question:
    """What is asked about."""

    name: str
    config: PretrainedConfig
    kind: Kind
    batch: int
    length: int
    profile: Profile
    dtype: torch.dtype
    threads: int
    changes: Changes = Changes()
    gpu: Gpu | None = None


def advise(
    question: Question,
    links: Mapping[str, WorkerLink],
    mask_link: WorkerLink | None,
    progress: Progress,
) -> Advice:
    """Count, measure and predict; some seconds, and a few for each worker.

    Args:
        links: an open link to each worker, by its address.
        mask_link: to the mask worker, where the profile has masks.
        progress: told what is being done.

    Raises:
        ConfigError: work or a profile that the cost model does not cover.
        WireError: a worker cannot be reached, refuses, or answers wrongly.
    """
    it = question
    progress("counting")
    work = count_work(it.kind, it.config, it.batch, it.length, it.profile, it.dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(it.threads)
    try:
        progress("this machine")
        machine, times = measure_machine(), ProductTimes(it.dtype)
        progress(f"{len(work.products)} shapes of products")
        all_products, kept = times.of_all(work.products), times.of_all(work.kept)
        width = it.config.get_text_config().hidden_size
        others = measure_others(it.kind, work.tokens, width, it.dtype)
        other, optimizer = others.of(work.others, work.other_bytes), measure_optimizer(work.trained)
        plain = all_products + other + optimizer
        inside = {_name(it.dtype): plain}
        if it.dtype != torch.bfloat16 and has_units_for(torch.bfloat16):
            progress("the same in bfloat16")
            inside["bfloat16"] = ProductTimes(torch.bfloat16).of_all(work.products) + other + optimizer
        workers = []
        for address, client in links.items():
            progress(f"worker {address}")
            link = measure_link(client, work.wire_dtype)
            request = max(work.requests, key=lambda one: work.requests[one] * one.flops)
            requests = measure_requests(
                client, mask_link, link, it.profile, request.rows, request.sent, it.dtype, work.wire_dtype,
                backward=it.kind == "step",
            )  # fmt: skip
            speeds = Speeds(all_products, kept, other, optimizer, link, requests)
            speeds = speeds.with_changes(**asdict(it.changes))
            workers.append(WorkerAdvice(address, speeds.link, speeds.requests, predict(work, speeds)))
    finally:
        torch.set_num_threads(before)
    what = {"model": it.name, "work": it.kind, "batch": it.batch, "length": it.length}
    what |= {"profile": it.profile.name, "dtype": _name(it.dtype), "threads": it.threads}
    return Advice(what, work, machine, plain, inside, workers, it.gpu, it.changes, environment(it.threads))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
