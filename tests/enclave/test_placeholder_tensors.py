"""A lazy product is waited for once, on first use, and not by what asks for its shape alone."""

from __future__ import annotations

import torch
from torch import Tensor

from obfuscatune.enclave.placeholder_tensors import LazyProduct

VALUES = torch.arange(6.0).view(2, 3)


class Awaiting:
    """A lazy product, and how often it was waited for."""

    def __init__(self) -> None:
        self.times = 0
        self.product = LazyProduct((2, 3), torch.zeros(1), self.finish)

    def finish(self) -> Tensor:
        self.times += 1
        return VALUES.clone().requires_grad_()


def test_its_shape_is_known_before_it_has_come() -> None:
    awaiting = Awaiting()
    y = awaiting.product
    assert (y.shape, y.dtype, y.device.type, y.dim(), y.size(1), y.numel()) == ((2, 3), torch.float32, "cpu", 2, 3, 6)
    assert isinstance(y, Tensor)
    assert awaiting.times == 0


def test_it_is_waited_for_once() -> None:
    awaiting = Awaiting()
    for found in (awaiting.product + 1, 1 + awaiting.product, torch.add(awaiting.product, 1)):
        assert type(found) is Tensor
        assert torch.equal(found, VALUES + 1)
    assert awaiting.times == 1


def test_it_is_found_in_lists_and_keywords() -> None:
    assert torch.equal(torch.cat([Awaiting().product, VALUES]), torch.cat([VALUES, VALUES]))
    assert torch.equal(torch.sum(input=Awaiting().product), VALUES.sum())


def test_what_is_asked_of_its_graph_waits_for_it() -> None:
    assert Awaiting().product.requires_grad
    assert Awaiting().product[0, 1] == 1


def test_changes_in_place_stay() -> None:
    with torch.no_grad():
        awaiting = Awaiting()
        awaiting.product.add_(1)
        assert torch.equal(awaiting.product * 1, VALUES + 1)
