"""The largest deviations of protected from plain runs, as a table: `python -m tests.contract.measure`."""

from __future__ import annotations

import sys

import torch

from obfuscatune import local_worker
from obfuscatune.enclave.local_worker import LocalWorker
from tests.contract.architectures import ARCHITECTURES, Architecture
from tests.contract.comparison import (
    backward,
    batch,
    copy_of,
    deviation,
    fine_tune,
    float64_kept,
    largest_deviation,
    protected,
    trained,
    with_lora,
)

COLUMNS = ("logits", "gradients", "ten steps", "with casts", "float32", "bfloat16", "bfloat16, plain")
LENGTHS = (13, 13)


@torch.no_grad()
def logits(chosen: Architecture, worker: LocalWorker, dtype: torch.dtype) -> tuple[float, float]:
    """Deviation of the protected model from the plain one, and of the plain one from itself in float64."""
    plain, exact = chosen.build(dtype), chosen.build(torch.float64)
    inputs = batch(LENGTHS, plain.config.vocab_size)
    reference = inputs.attended(exact(**inputs.inputs()).logits)
    expected = inputs.attended(plain(**inputs.inputs()).logits)
    with protected(plain, worker) as model:
        found = inputs.attended(model(**inputs.inputs()).logits)
    return deviation(expected, found), deviation(reference, expected.double())


def training(chosen: Architecture, worker: LocalWorker) -> tuple[float, float]:
    """Deviation of all gradients of one pass, and of all adapter weights after ten steps; in float64."""
    plain = chosen.build(torch.float64)
    vocabulary = plain.config.vocab_size
    reference = with_lora(copy_of(plain), chosen, lora_dropout=0.1).train()
    inputs = batch((13, 4), vocabulary)
    with float64_kept(), protected(copy_of(plain), worker) as model:
        adapted = with_lora(model, chosen, lora_dropout=0.1).train()
        gradient = largest_deviation(backward(reference, inputs)[1], backward(adapted, inputs)[1])
        reference.zero_grad(), adapted.zero_grad()
        fine_tune(reference, vocabulary, steps=10), fine_tune(adapted, vocabulary, steps=10)
    return gradient, largest_deviation(trained(reference), trained(adapted))


def measure(chosen: Architecture, worker: LocalWorker) -> tuple[float, ...]:
    """One row of the table."""
    with_casts, _ = logits(chosen, worker, torch.float64)
    single, _ = logits(chosen, worker, torch.float32)
    half, half_plain = logits(chosen, worker, torch.bfloat16)
    gradient, weights = training(chosen, worker)
    with float64_kept():
        exact, _ = logits(chosen, worker, torch.float64)
    return exact, gradient, weights, with_casts, single, half, half_plain


def main() -> None:
    """Print the table, in Markdown."""
    sys.stdout.write(f"| |{'|'.join(COLUMNS)}|\n|---|{'---|' * len(COLUMNS)}\n")
    with local_worker(threads=1) as worker:
        for name, chosen in ARCHITECTURES.items():
            row = "|".join(f"{value:.0e}" for value in measure(chosen, worker))
            sys.stdout.write(f"|{name}|{row}|\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
