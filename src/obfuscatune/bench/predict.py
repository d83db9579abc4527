"""`bench predict`: how long a protected step takes beside a plain one, from speeds and a model's shape.

    plain      = products / plain speed   + other operations / plain speed
    protected  = products that stay / enclave speed + other operations / enclave speed
               + worker's products / worker speed
               + bytes that cross / speed of rotating and mixing them, both ways
               + crossings · latency + bytes that cross / link's bandwidth

Speeds come from one measured result; each can be set otherwise, as for a worker on an accelerator or another host.
Enclave and worker are taken to work in turn, as they do on one host. How much work a step is, is counted from the
model's shape alone: a model without weights runs on torch's `meta` device, which computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from obfuscatune.bench.measures import CHECK, COPY, ENCLAVE, ProductCounter
from obfuscatune.bench.step_result import LINK, WORKER
from obfuscatune.bench.workload import LORA, NAMES, config_of
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixing import KroneckerMixer
from obfuscatune.enclave.plan import LayerPlan, make_plan
from obfuscatune.enclave.profiles import Profile, resolve
from obfuscatune.errors import ConfigError
from obfuscatune.report.page import markdown_table
from obfuscatune.training.adapter import without_peft_warnings

WORKS = ("step", "forward")


@dataclass(frozen=True)
class Work:
    """What one step or pass computes and sends. `flops` are floating-point operations of matrix products."""

    plain_flops: float
    other_bytes: float
    """Bytes written by all operations but products; the same for plain and protected."""
    enclave_flops: float
    """Those of the plain model's products that stay in the enclave."""
    worker_flops: float
    """Those of the worker's products, shield rows included."""
    crossings: int
    crossing_bytes: float
    """Bytes in both directions."""


def count_work(work: str, shape: str, layers: int | None, batch: int, length: int, profile: Profile) -> Work:
    """Count the work of `bench step` or `bench forward`. Takes seconds and little memory for models of any size.

    Raises:
        ConfigError: an unknown shape, other work, or a profile that trains adapters on the worker.
    """
    if work not in WORKS:
        raise ConfigError(f"work is counted of {' and '.join(WORKS)}, not of {work!r}")
    if profile.lora_on == "worker":
        raise ConfigError("the cost model has LoRA in the enclave: use a profile such as private")
    if profile.masks:
        raise ConfigError("the cost model has one worker and no masks: use a profile such as private")
    config = config_of(shape, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        plan = make_plan(model, profile)
        ids = torch.zeros(batch, length, dtype=torch.long)
        if work == "step":
            with without_peft_warnings():
                tuned = get_peft_model(model, LoraConfig(**LORA)).train()
            with ProductCounter() as counter:
                tuned(input_ids=ids, labels=ids).loss.backward()
        else:
            with torch.inference_mode(), ProductCounter() as counter:
                model.eval()(input_ids=ids)
    rows, count_rows = batch * length, _row_counter(profile)
    moved, computed, crossings, crossed = 0.0, 0.0, 0, 0.0
    for layer in plan.layers:
        for width in _widths_sent(layer, backward=work == "step"):
            sent = count_rows(rows, width)
            moved += 2 * rows * layer.parameters
            computed += 2 * sent * layer.parameters
            crossings += 1
            crossed += sent * (layer.p + layer.q) * layer.element_bytes
    return Work(counter.flops, counter.other_nbytes, counter.flops - moved, computed, crossings, crossed)


def _widths_sent(layer: LayerPlan, *, backward: bool) -> list[int]:
    """How wide the rows are of each crossing of a layer."""
    return [layer.p] * layer.forward_crossings + [layer.q] * (layer.backward_crossings if backward else 0)


def _row_counter(profile: Profile) -> Callable[[int, int], int]:
    """How many rows cross for (rows, width): what the profile's mixing makes of them."""
    mixer = KroneckerMixer(profile.shield_rows, SecretStream.fresh(), in_buckets=profile.buckets == "ladder")

    @cache
    def count(rows: int, width: int) -> int:
        return mixer.draw(rows, width).rows if profile.mixing else rows

    return count


_PER_CROSSING = ("rotate", ENCLAVE["mix"], CHECK, COPY)


@dataclass(frozen=True)
class Processor:
    """The speed of one process, in 10⁹ per second."""

    gflops: float
    """Floating-point operations in products."""
    gbytes: float
    """Bytes written by other operations."""


@dataclass(frozen=True)
class Speeds:
    """The speeds of machines and link that a prediction needs."""

    plain: Processor
    enclave: Processor
    worker_gflops: float
    crossing_gbytes: float
    """10⁹ bytes that cross per second of rotating, mixing, drawing and checking."""
    latency_seconds: float
    """Time of one crossing besides that for its bytes."""
    link_gbytes: float | None = None
    """10⁹ bytes per second, both directions together; None for shared memory."""

    def with_changes(
        self, worker_gflops: float | None, link_gbytes: float | None, latency_seconds: float | None
    ) -> Speeds:
        """A copy with another worker or link; None keeps a speed."""
        return replace(
            self,
            worker_gflops=self.worker_gflops if worker_gflops is None else worker_gflops,
            link_gbytes=self.link_gbytes if link_gbytes is None else link_gbytes,
            latency_seconds=self.latency_seconds if latency_seconds is None else latency_seconds,
        )


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step or pass."""

    plain_seconds: float
    parts: dict[str, float]
    """Seconds of the protected one by part."""

    @property
    def protected_seconds(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """Protected over plain."""
        return self.protected_seconds / self.plain_seconds

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self) | {"protected_seconds": self.protected_seconds, "ratio": self.ratio}

    def as_markdown(self) -> str:
        """A table of the parts."""
        rows = [(name, f"{part:.3f}", f"{part / self.protected_seconds:.0%}") for name, part in self.parts.items()]
        rows += [("protected", f"{self.protected_seconds:.3f}", ""), ("plain", f"{self.plain_seconds:.3f}", "")]
        return markdown_table(("", "seconds", "share"), [*rows, ("ratio", f"**{self.ratio:.2f}**", "")]) + "\n"


def predict(work: Work, speeds: Speeds) -> Prediction:
    """The seconds that the formulas above give."""
    plain = work.plain_flops / speeds.plain.gflops + work.other_bytes / speeds.plain.gbytes
    link = 0.0 if speeds.link_gbytes is None else work.crossing_bytes / speeds.link_gbytes
    parts = {
        "products in the enclave": work.enclave_flops / speeds.enclave.gflops,
        "other operations": work.other_bytes / speeds.enclave.gbytes,
        "worker's products": work.worker_flops / speeds.worker_gflops,
        "rotating, mixing, drawing, checking": work.crossing_bytes / speeds.crossing_gbytes,
        "latency": 1e9 * work.crossings * speeds.latency_seconds,
        "link's bandwidth": link,
    }
    return Prediction(plain / 1e9, {name: part / 1e9 for name, part in parts.items()})


def calibrate(document: Mapping[str, Any], profile: str, work: Work) -> Speeds:
    """The speeds at which a result of `bench step` or `bench forward` was made; `work` is that of the same bench.

    Raises:
        ConfigError: the result has no such profile.
    """
    if profile not in document["protected"]:
        raise ConfigError(f"that result has no profile {profile!r}, but {', '.join(document['protected'])}")
    plain, protected = document["plain"], document["protected"][profile]
    own = protected["breakdown_seconds"]
    crossing = sum(own.get(name, 0.0) for name in _PER_CROSSING)
    return Speeds(
        _processor(plain["breakdown_seconds"], work.plain_flops, work.other_bytes),
        _processor(own, work.enclave_flops, work.other_bytes),
        work.worker_flops / protected["worker_seconds"] / 1e9,
        work.crossing_bytes / crossing / 1e9,
        own[LINK] / work.crossings,
    )


def _processor(breakdown: Mapping[str, float], flops: float, other_bytes: float) -> Processor:
    products = breakdown["products"]
    elsewhere = ("products", *_PER_CROSSING, WORKER, LINK)
    others = sum(part for name, part in breakdown.items() if name not in elsewhere)
    return Processor(flops / products / 1e9, other_bytes / others / 1e9)


@dataclass(frozen=True)
class Checked:
    """A kept result's ratio, and what was predicted for the same work."""

    file: str
    what: str
    profile: str
    plain_seconds: tuple[float, float]
    """Predicted, measured."""
    protected_seconds: tuple[float, float]
    ratio: tuple[float, float]

    @property
    def error(self) -> float:
        """Relative error of the predicted ratio; 0.1 is 10 % too high."""
        return self.ratio[0] / self.ratio[1] - 1


def calibrated(document: Mapping[str, Any], profile: str) -> Speeds:
    """As `calibrate`, with the work counted that the result is of.

    Raises:
        ConfigError: its shape has no name, its profile is not covered, or it is of other work.
    """
    return calibrate(document, profile, _work_of(document, profile))


def check(results: Iterable[tuple[str, Mapping[str, Any]]], speeds: Speeds) -> Iterator[Checked]:
    """Every ratio of the named results that the model covers, beside the predicted one."""
    for file, document in results:
        bench = document["bench"]
        if bench["work"] not in WORKS or bench["shape"] not in NAMES:
            continue
        depth = "" if bench["layers"] is None else f", {bench['layers']} layers"
        what = f"{bench['work']}, {bench['shape']}{depth}, {bench['batch']} x {bench['length']}"
        for profile, side in document["protected"].items():
            if resolve(profile).lora_on == "worker":
                continue
            it = predict(_work_of(document, profile), speeds)
            yield Checked(
                file,
                what,
                profile,
                (it.plain_seconds, document["plain"]["seconds"]),
                (it.protected_seconds, side["seconds"]),
                (it.ratio, side["ratio"]),
            )


def check_as_markdown(checked: Iterable[Checked]) -> str:
    """Predicted beside measured."""
    columns = ["", "profile", "plain s, predicted", "measured", "protected s, predicted", "measured"]
    columns += ["ratio, predicted", "measured", "off by"]
    rows = []
    for one in checked:
        pairs = (*one.plain_seconds, *one.protected_seconds, *one.ratio)
        rows.append((one.what, f"`{one.profile}`", *(f"{value:.2f}" for value in pairs), f"{one.error:+.0%}"))
    return markdown_table(columns, rows, text_columns=2) + "\n"


def _work_of(document: Mapping[str, Any], profile: str) -> Work:
    bench = document["bench"]
    return count_work(bench["work"], bench["shape"], bench["layers"], bench["batch"], bench["length"], resolve(profile))
