"""Where a piece of work spends its time, by torch's profiler: categories that add up to the time that passed.

Every operation counts with its own time, without that of the operations it calls, in the first category that it, or an
operation that called it, belongs to. What is in no operation at all is Python.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

OWN = "obfuscatune."
"""The enclave's own spans begin so."""
WAIT = "wait"
"""Its span of that name, without the operations in it: those are checks of what came."""
SEND = "send"
CHECK, COPY, PYTHON, OTHER = "check", "copy", "Python between operations", "other operations"
ENCLAVE = {"mix": "mix, and draw secrets", "verify": CHECK}
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
