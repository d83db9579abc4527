"""The cost model: seconds of a step, a pass or a token, plain and protected, part by part.

    plain      = products + other operations + optimizer
    protected  = products that stay + other operations + optimizer
               + for each request: the enclave's own part, latency, bytes up and down, the worker's product
               + for each request under masks: waiting for the mask worker

Enclave and worker are taken to work in turn: the time of one stream. Of several workers, either each has a share of
the columns (`sharded`), or each serves streams of its own (`Team`): then the enclave computes for one stream while
others are on their way, until its own part is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from obfuscatune.advise.link import Link, RequestTimes
from obfuscatune.advise.work import Work

OWN = ("products in the enclave", "other operations", "optimizer", "rotate, mix, verify")
"""Parts that only the enclave can do."""
PRODUCTS, MASKS, LATENCY, UP, DOWN = "worker's products", "waiting for masks", "latency", "bytes up", "bytes down"
BY_ENCLAVE, BY_WORKERS, BY_MASKS = "the enclave", "the workers", "the mask worker"


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
    """Seconds of one stream, with one worker or with several that share the columns."""

    plain_seconds: float
    parts: dict[str, float]
    """Of the protected run."""
    whole: tuple[float, float] = (1.0, 1.0)
    """Shares of the bytes up and down that every worker passes, where several share the columns."""

    @property
    def seconds(self) -> float:
        """Protected."""
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
    def worker_seconds(self) -> float:
        """In which the worker and its link are taken: latency is not, since other streams' requests may pass."""
        return sum(self.parts[name] for name in (PRODUCTS, UP, DOWN))

    @property
    def streams(self) -> int:
        """How many at a time keep the enclave busy."""
        return max(1, math.ceil(self.seconds / max(self.own_seconds, 1e-12)))


def predict(work: Work, speeds: Speeds) -> Prediction:
    """With one worker."""
    requests, link = speeds.requests, speeds.link
    elements = sum(count * it.sent * it.p * it.q for it, count in work.requests.items())
    own = work.crossings * requests.own_seconds + work.crossing_bytes * requests.own_seconds_a_byte
    parts = {
        "products in the enclave": speeds.kept_products,
        "other operations": speeds.others,
        "optimizer": speeds.optimizer,
        "rotate, mix, verify": own,
        PRODUCTS: elements * requests.seconds_an_element,
        MASKS: elements * requests.mask_seconds_an_element,
        LATENCY: work.crossings * link.latency_seconds,
        UP: link.seconds(work.bytes_up, 0),
        DOWN: link.seconds(0, work.bytes_down),
    }
    up, down = work.whole_bytes
    whole = (up / max(work.bytes_up, 1), down / max(work.bytes_down, 1))
    return Prediction(speeds.plain_products + speeds.others + speeds.optimizer, parts, whole)


def mean(predictions: Sequence[Prediction]) -> Prediction:
    """Of the same work."""
    parts = {name: sum(it.parts[name] for it in predictions) / len(predictions) for name in predictions[0].parts}
    return replace(predictions[0], parts=parts)


def sharded(predictions: Sequence[Prediction]) -> Prediction:
    """The same work with the columns of every matrix shared out, as much to each worker as it is fast.

    Rows and summands pass the enclave's own network one after the other. The mask worker stays as it is.
    """
    shares = _shares([it.parts[PRODUCTS] for it in predictions])
    one = mean(predictions)
    parts = one.parts | {
        PRODUCTS: max(share * it.parts[PRODUCTS] for share, it in zip(shares, predictions, strict=True)),
        LATENCY: max(it.parts[LATENCY] for it in predictions),
    }
    for name, whole in zip((UP, DOWN), one.whole, strict=True):
        parts[name] = sum(
            it.parts[name] * (whole + (1 - whole) * share) for share, it in zip(shares, predictions, strict=True)
        )
    return replace(one, parts=parts)


def _shares(seconds: Sequence[float]) -> list[float]:
    """Of each worker, by what it takes alone: in proportion to its speed."""
    speeds = [1 / max(it, 1e-12) for it in seconds]
    return [it / sum(speeds) for it in speeds]


@dataclass(frozen=True)
class Team:
    """Several workers of one enclave, by what one stream takes with each of them alone."""

    members: tuple[Prediction, ...]

    @classmethod
    def of(cls, predictions: Sequence[Prediction], count: int) -> Team:
        """The `count` fastest; where there are not so many, further ones like their mean."""
        known = sorted(predictions, key=lambda it: it.worker_seconds)[:count]
        return cls((*known, *[mean(predictions)] * (count - len(known))))

    @property
    def sharded_seconds(self) -> float:
        """Of one stream, with columns shared out."""
        return sharded(self.members).seconds

    @property
    def _seconds(self) -> dict[str, float]:
        """Of each step, pass or token, by who may be the limit where enough streams run at a time."""
        one = mean(self.members)
        rate = sum(1 / max(it.worker_seconds, 1e-12) for it in self.members)
        return {BY_ENCLAVE: one.own_seconds, BY_WORKERS: 1 / rate, BY_MASKS: one.parts[MASKS]}

    @property
    def streamed_seconds(self) -> float:
        """Of each step, pass or token where enough streams run at a time, each on one of the workers."""
        return max(self._seconds.values())

    @property
    def limit(self) -> str:
        """What keeps more streams from being faster."""
        return max(self._seconds, key=lambda name: self._seconds[name])


def most_fed(predictions: Sequence[Prediction]) -> int:
    """How many workers, the given ones first and then others like them, one enclave keeps busy: more are of no use."""
    one = mean(predictions)
    count = next((n for n in range(1, len(predictions)) if Team.of(predictions, n).limit != BY_WORKERS), None)
    if count is not None:
        return count
    known = sum(1 / max(it.worker_seconds, 1e-12) for it in predictions)
    wanted = 1 / max(one.own_seconds, one.parts[MASKS], 1e-12) - known
    return len(predictions) + max(0, math.ceil(wanted * one.worker_seconds))
