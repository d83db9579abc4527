"""`torch.compile` around a protected model: the request is left out, the rest is compiled, and nothing is printed."""

from __future__ import annotations

import pytest
import torch

from obfuscatune.enclave.local_worker import LocalWorker
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import backward, batch, deviation, largest_deviation, protected, with_lora

LLAMA = ARCHITECTURES["llama"]


@pytest.mark.long
# torch's own: at its first use, and where it looks at a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute of a Tensor")
def test_compiled_it_is_as_plain(worker: LocalWorker, capfd: pytest.CaptureFixture[str]) -> None:
    """With a backend that calls what was traced as it is: what this takes is tracing, not code generation."""
    inputs = batch((6, 4), 97)
    expected_loss, expected = backward(with_lora(LLAMA.build(torch.float32)), inputs)
    torch._dynamo.reset()
    with protected(LLAMA.build(torch.float32), worker) as model:
        adapted = with_lora(model)
        compiled = torch.compile(adapted, backend="eager")
        for _ in range(2):
            adapted.zero_grad()
            loss = compiled(**inputs.inputs()).loss
            loss.backward()
            found = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
            assert deviation(expected_loss, loss.detach()) < 1e-4
            assert largest_deviation(expected, found) < 1e-3
    printed = capfd.readouterr()
    assert not printed.err and not printed.out
    torch._dynamo.reset()
