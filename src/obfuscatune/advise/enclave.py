"""How fast this machine is: products by shape, other operations, memory. Measured when it is asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from obfuscatune.advise.work import Kind
from obfuscatune.backend.computer import has_units_for
from obfuscatune.bench.measures import Product, ProductCounter, measure_limits, median_seconds
from obfuscatune.bench.workload import WORKLOADS, random_model
from obfuscatune.machine import cores, memory_bytes

COLD_BYTES = 128 << 20
"""Of matrices that few rows are multiplied by in turn: more than caches hold, as a model's matrices are."""
MOST_BYTES = 64 << 20
"""Largest factor that is made; a product with a larger one is timed on some of its columns."""
FEW_ROWS = 128
_LEAST_SECONDS, _REPEATS = 0.02, 3
_SIDE = 1024
UNITS = {
    "AMX": ("_is_amx_tile_supported",),
    "AVX-512": ("_is_avx512_supported",),
    "AVX-512 BF16": ("_is_avx512_bf16_supported",),
}
"""Functions of `torch.cpu` that tell what the processor has; none of them where torch has no such function."""


@dataclass(frozen=True)
class Machine:
    """What was measured of this machine. 10⁹ operations, and 10⁹ bytes, a second."""

    cores: int
    units: tuple[str, ...]
    """Of `UNITS`, those that are there."""
    gflops: dict[str, float]
    """Of a product, by dtype; of bfloat16 only where the processor has units for it."""
    read_gbytes: float
    copied_gbytes: float
    memory_bytes: int
    free_bytes: int


def measure_machine() -> Machine:
    """About a second."""
    limits = measure_limits()
    gflops = {"float32": limits.gflops}
    for dtype in (torch.float64, torch.bfloat16):
        if has_units_for(dtype):
            product = Product(_SIDE, _SIDE, _SIDE)
            gflops[str(dtype).removeprefix("torch.")] = product.flops / ProductTimes(dtype).of(product) / 1e9
    return Machine(
        cores(), units(), gflops, limits.read_gbytes, limits.copied_gbytes, memory_bytes(), free_memory_bytes()
    )


def units() -> tuple[str, ...]:
    """What the processor has for products, as torch says."""
    return tuple(name for name, asked in UNITS.items() if all(_says(one) for one in asked))


def _says(name: str) -> bool:
    function = getattr(torch.cpu, name, None)
    return function is not None and bool(function())


def free_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """That could be had without swapping; all of it where the system does not tell."""
    try:
        lines = meminfo.read_text("ascii").splitlines()
    except OSError:
        return memory_bytes()
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*free, memory_bytes()])


class ProductTimes:
    """Seconds of a product by its shape, in one dtype, with the threads that torch has. Each is measured once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._known: dict[Product, float] = {}

    def of(self, product: Product) -> float:
        """Seconds of one such product."""
        if product not in self._known:
            self._known[product] = self._measured(product)
        return self._known[product]

    def of_all(self, products: Counter[Product]) -> float:
        """Seconds of all of them, one after the other."""
        return sum(self.of(product) * count for product, count in products.items())

    def _measured(self, product: Product) -> float:
        rows, inner, columns, transposed = product
        size = self._dtype.itemsize
        least = min(columns, 64)
        timed = min(columns, max(least, MOST_BYTES // (inner * size)))
        few = rows <= FEW_ROWS
        copies = max(1, min(32, COLD_BYTES // (inner * timed * size))) if few and inner * timed * size > 1 << 20 else 1
        matrices = [_filled(timed, inner, self._dtype).t() if transposed else _filled(inner, timed, self._dtype)
                    for _ in range(copies)]  # fmt: skip
        x, out, turn = _filled(rows, inner, self._dtype), torch.empty(rows, timed, dtype=self._dtype), 0

        def work() -> None:
            nonlocal turn
            torch.mm(x, matrices[turn % copies], out=out)
            turn += 1

        with torch.inference_mode():
            seconds = median_seconds(work, repeats=max(_REPEATS, copies), least_seconds=_LEAST_SECONDS)
        return seconds * columns / timed


def _filled(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers that are no zeros and cost little to make; the time of a product does not depend on them."""
    return torch.full((rows, columns), 0.5, dtype=dtype)


class _Others(nn.Module):
    """What a block does beside products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self._dropout, self._act = nn.Dropout(0.05), nn.GELU("tanh")

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width) to the same."""
        for norm in self._norms:
            x = x + self._dropout(self._act(norm(x)) * 0.5)
        return x


@dataclass(frozen=True)
class OtherTimes:
    """Seconds of operations that are no products: so many for each, and for each byte that they write."""

    seconds_each: float
    seconds_a_byte: float

    def of(self, count: float, nbytes: float) -> float:
        """Seconds of so many."""
        return count * self.seconds_each + nbytes * self.seconds_a_byte


def measure_others(kind: Kind, rows: int, width: int, dtype: torch.dtype = torch.float32) -> OtherTimes:
    """Each operation as in a tiny model, where nothing else counts; each byte as in what blocks do on (rows, width)."""
    backward = kind == "step"
    (few_bytes, few), (nbytes, many) = (
        _others(*size, backward=backward, dtype=dtype) for size in ((1, 64), (max(rows, 2), max(width, 128)))
    )
    return OtherTimes(_seconds_each(kind), max((many - few) / max(nbytes - few_bytes, 1), 0.0))


def _seconds_each(kind: Kind) -> float:
    """Of one operation that is no product, with all that Python does between."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, max_position_embeddings=64,
    )  # fmt: skip
    work = WORKLOADS[kind](random_model(config), 1, 2)
    seconds = median_seconds(work, least_seconds=2 * _LEAST_SECONDS, prepare=work.prepare)
    work.prepare()
    with ProductCounter() as counter:
        work()
    return float(seconds / counter.others)


def _others(rows: int, width: int, *, backward: bool, dtype: torch.dtype) -> tuple[int, float]:
    """Bytes that operations write, and seconds."""
    block = _Others(width).to(dtype).train(backward)
    x = torch.full((rows, width), 0.5, dtype=dtype, requires_grad=backward)

    def work() -> None:
        if backward:
            block(x).sum().backward()
        else:
            with torch.inference_mode():
                block(x)

    seconds = median_seconds(work, least_seconds=2 * _LEAST_SECONDS)
    with ProductCounter() as counter:
        work()
    return counter.other_nbytes, seconds


def measure_optimizer(parameters: int, tensors: int = 64) -> float:
    """Seconds of a step of AdamW over so many parameters in float32."""
    if not parameters:
        return 0.0
    size = max(1, min(parameters, 1 << 24) // tensors)
    weights = [nn.Parameter(torch.ones(size)) for _ in range(tensors)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW(weights)
    return median_seconds(optimizer.step) * parameters / (size * tensors)
