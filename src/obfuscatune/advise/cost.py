"""The cost model: seconds of a step, a pass or a token, plain and protected, part by part.

    plain      = products + other operations + optimizer
    protected  = products that stay + other operations + optimizer
               + for each request: the enclave's own part, latency, bytes up and down, the worker's product
               + for each request under masks: waiting for the mask worker

Enclave and worker are taken to work in turn: the time of one stream. With N workers, either each has a share of the
columns (`sharded`), or each serves streams of its own (`replicated`): then the enclave computes for one stream while
others are on their way, until its own part is the limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from obfuscatune.advise.link import Link, RequestTimes
from obfuscatune.advise.work import Work

OWN = ("products in the enclave", "other operations", "optimizer", "rotate, mix, verify")
"""Parts that only the enclave can do."""
PRODUCTS, MASKS, LATENCY, UP, DOWN = "worker's products", "waiting for masks", "latency", "bytes up", "bytes down"


@dataclass(frozen=True)
class Speeds:
    """Of one enclave, one link and one worker, for one piece of work."""

    plain_products: float
    """Seconds of all products of the plain run, in the enclave."""
    kept_products: float
    """Of those that stay there."""
    others: float
    optimizer: float
    link: Link
    requests: RequestTimes

    def with_changes(
        self, worker_gflops: float | None = None, link_gbytes: float | None = None, latency_us: float | None = None
    ) -> Speeds:
        """A copy with another worker or link; None keeps what was measured."""
        requests, link = self.requests, self.link
        if worker_gflops is not None:
            element, masks = 2e-9 / worker_gflops, requests.mask_seconds_an_element
            masks = element if masks else 0.0
            requests = replace(requests, seconds_an_element=element, mask_seconds_an_element=masks)
        if link_gbytes is not None:
            link = replace(link, up_seconds_a_byte=1e-9 / link_gbytes, down_seconds_a_byte=1e-9 / link_gbytes)
        if latency_us is not None:
            link = replace(link, latency_seconds=latency_us * 1e-6)
        return replace(self, requests=requests, link=link)


@dataclass(frozen=True)
class Prediction:
    """Seconds."""

    plain_seconds: float
    parts: dict[str, float]
    """Of the protected run, with one worker."""
    workers: int = 1

    @property
    def seconds(self) -> float:
        """Protected, one stream, columns shared out among the workers."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """Protected over plain."""
        return self.seconds / self.plain_seconds

    @property
    def own_seconds(self) -> float:
        """What only the enclave can do."""
        return sum(self.parts[name] for name in OWN)

    @property
    def streamed_seconds(self) -> float:
        """Of each step, pass or token where as many streams as pay run at a time, each on a worker of its own."""
        one = sharded(self, 1)
        return max(self.own_seconds, one.seconds / self.workers)

    @property
    def busy_workers(self) -> int:
        """How many workers the enclave can keep busy, each with streams of its own: more of them are of no use."""
        one = sharded(self, 1)
        return max(1, math.ceil((one.seconds - one.own_seconds) / max(one.own_seconds, 1e-12)))


def predict(work: Work, speeds: Speeds) -> Prediction:
    """With one worker."""
    requests, size = speeds.requests, work.wire_dtype.itemsize
    elements = sum(count * it.sent * it.p * it.q for it, count in work.requests.items())
    own = work.crossings * requests.own_seconds + work.crossing_bytes * requests.own_seconds_a_byte
    parts = {
        "products in the enclave": speeds.kept_products,
        "other operations": speeds.others,
        "optimizer": speeds.optimizer,
        "rotate, mix, verify": own,
        PRODUCTS: elements * requests.seconds_an_element,
        MASKS: elements * requests.mask_seconds_an_element,
        LATENCY: work.crossings * speeds.link.latency_seconds,
        UP: speeds.link.seconds(work.bytes_up, 0),
        DOWN: speeds.link.seconds(0, work.bytes_down),
    }
    if not size or not work.crossings:
        parts |= dict.fromkeys((PRODUCTS, MASKS, LATENCY, UP, DOWN), 0.0)
    return Prediction(speeds.plain_products + speeds.others + speeds.optimizer, parts)


def sharded(one: Prediction, workers: int) -> Prediction:
    """The same with the columns of every matrix shared out: all are sent all rows, each answers with its columns.

    Rows pass the enclave's own network N times; forward and backward are taken alike.
    """
    parts = dict(one.parts)
    parts[PRODUCTS] *= one.workers / workers
    parts[MASKS] *= one.workers / workers
    parts[UP] *= workers / one.workers
    return replace(one, parts=parts, workers=workers)
