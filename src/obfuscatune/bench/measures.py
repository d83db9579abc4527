"""What a piece of work did: its products, and where its time went; and what the machine can do at most."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_FACTORS = {_aten.mm: (0, 1), _aten.bmm: (0, 1), _aten.addmm: (1, 2), _aten.baddbmm: (1, 2)}
"""Which arguments are multiplied."""


class Product(NamedTuple):
    """The shape of a product: (rows, inner) by (inner, columns)."""

    rows: int
    inner: int
    columns: int
    transposed: bool = False
    """Whether the second factor lies in memory by columns, as the weight of an `nn.Linear` does."""

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return 2 * self.rows * self.inner * self.columns


class ProductCounter(TorchDispatchMode):
    """While it is entered, every product that torch computes is counted; what compiled kernels do is not.

    Attention that is computed as one operation is not counted either: where it is, it is fast on either side.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.nbytes = 0
        """Bytes of both factors and the result, summed over all products."""
        self.other_nbytes = 0
        """Bytes written by other operations."""
        self.others = 0
        """How many of these there were."""
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count and compute."""
        factors = _FACTORS.get(func.overloadpacket)
        if factors is None:
            with self:  # what is made of other operations is seen through them
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
            result = func(*args, **(kwargs or {}))
            if not func.is_view:
                self.others += 1
                results = result if isinstance(result, tuple | list) else (result,)
                self.other_nbytes += sum(x.numel() * x.itemsize for x in results if isinstance(x, Tensor))
            return result
        result = func(*args, **(kwargs or {}))
        self.count(args[factors[0]], args[factors[1]], result)
        return result

    def count(self, a: Tensor, b: Tensor, result: Tensor) -> None:
        """One product of a (…, n, k) by b with that result."""
        self.flops += 2 * result.numel() * a.shape[-1]
        self.nbytes += sum(x.numel() * x.itemsize for x in (a, b, result))
        rows, inner = a.shape[-2:]
        product = Product(rows, inner, b.shape[-1], transposed=b.stride(-1) != 1)
        self.products[product] += a.shape[:-2].numel()


OWN = "obfuscatune."
"""The enclave's own spans begin so."""
WAIT = "wait"
"""Its span of that name, without the operations in it: those are checks of what came."""
SEND = "send"
CHECK, COPY, PYTHON, OTHER = "check", "copy", "Python between operations", "other operations"
ENCLAVE = {"mix": "mix, and draw secrets", "mask": "draw masks, mask and unmask", "verify": CHECK}
"""Spans of the enclave that are called otherwise here."""
_COPIES = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::_to_copy")
_MODEL = {
    "attention": ("scaled_dot_product", "ScaledDotProduct", "aten::_softmax", "SoftmaxBackward"),
    "optimizer": ("Optimizer.",),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
}


@contextmanager
def measured_spans() -> Iterator[dict[str, float]]:
    """Seconds in each category; filled in at the end."""
    spans: dict[str, float] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        yield spans
        passed = time.perf_counter() - started
    for event in profiler.events() or ():
        category = _category(event)
        spans[category] = spans.get(category, 0.0) + event.self_cpu_time_total / 1e6
    spans[PYTHON] = max(passed - sum(spans.values()), 0.0)


def _category(event: Any) -> str:
    model = OTHER
    caller = event
    while caller is not None:
        if caller.name.startswith(OWN):
            if event.name.startswith(_COPIES):
                return COPY
            own = caller.name.removeprefix(OWN)
            return CHECK if own == WAIT and event is not caller else ENCLAVE.get(own, own)
        if model == OTHER:
            model = next((name for name, marks in _MODEL.items() if any(m in caller.name for m in marks)), OTHER)
        caller = caller.cpu_parent
    return model


SIDE = 1536
"""Rows and columns of the matrices in the timed product: large enough for the full speed of a product."""
LARGE_BYTES = 256 << 20
"""Bytes of the array that is copied and summed."""
REPEATS = 5
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Limits:
    """10⁹ operations and 10⁹ bytes a second, with the threads that torch has."""

    gflops: float
    """Floating-point operations of a product of two float32 matrices."""
    copied_gbytes: float
    """Bytes read and written by a copy."""
    read_gbytes: float
    """Bytes read by a sum."""

    def least_seconds(self, flops: float, nbytes: float = 0.0) -> float:
        """The least that products of so many operations can take, if they must also read so many bytes once."""
        return max(flops / self.gflops, nbytes / max(self.read_gbytes, self.copied_gbytes)) / 1e9

    def passing_seconds(self, nbytes: float) -> float:
        """The least that so many bytes, read and written together, can take."""
        return nbytes / self.copied_gbytes / 1e9


def settle(device: torch.device) -> None:
    """Wait for what was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def settled_seconds(
    work: Callable[[], object], device: torch.device, *, repeats: int = REPEATS, least_seconds: float = 0.0
) -> float:
    """As `median_seconds`, each call until the device has done what it launched."""

    def once() -> None:
        work()
        settle(device)

    return median_seconds(once, repeats=repeats, least_seconds=least_seconds)


def measure_limits(*, side: int = SIDE, large_bytes: int = LARGE_BYTES, device: torch.device = CPU) -> Limits:
    """About a second, with the sizes as they are."""
    with torch.inference_mode(), device:
        a, large = torch.randn(side, side), torch.ones(large_bytes // 4)
        out, copy = torch.empty_like(a), torch.empty_like(large)
        product = settled_seconds(lambda: torch.mm(a, a, out=out), device)
        copying = settled_seconds(lambda: copy.copy_(large), device)
        reading = settled_seconds(large.sum, device)
    return Limits(2 * side**3 / product / 1e9, 2 * large.nbytes / copying / 1e9, large.nbytes / reading / 1e9)


def median_seconds(
    work: Callable[[], object],
    *,
    repeats: int = REPEATS,
    least_seconds: float = 0.0,
    prepare: Callable[[], object] = lambda: None,
) -> float:
    """Median time of a call in seconds, over at least `repeats` calls and `least_seconds`, after one untimed call.

    `prepare` is called before each, and not timed.
    """
    prepare()
    work()
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < least_seconds:
        prepare()
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
