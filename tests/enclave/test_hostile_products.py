"""A worker that computes wrongly, seen from the model: one clear error, forward and backward, and no retries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from obfuscatune import protect
from obfuscatune.errors import BadReply, WrongProduct
from obfuscatune.worker import adapter_handlers, handlers
from obfuscatune.worker.buffers import MatrixBuffer
from obfuscatune.worker.replies import Request
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import backward, batch, with_lora
from tests.worker.serving import Serving, serving

Tampering = Callable[[torch.Tensor], None]


def tampered(worker: Serving, tamper: Tampering, *, transpose: bool) -> None:
    """From here on the worker changes its products by the matrices, or those by their transposes."""
    computer = worker.service.answerer.computer
    honest = computer.multiply

    def multiply(rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, **how: bool) -> None:
        honest(rows, matrix, out, **how)
        if how["transpose"] == transpose:
            tamper(out)

    computer.multiply = multiply  # type: ignore[method-assign]


def one_element(out: torch.Tensor) -> None:
    out[0, 0] += out.square().mean().sqrt()


def one_percent(out: torch.Tensor) -> None:
    out += 0.01 * out.square().mean().sqrt() * torch.randn(out.shape)


def other_rows(out: torch.Tensor) -> None:
    out.copy_(out.flip(0))


@pytest.mark.parametrize("tamper", [one_element, one_percent, other_rows])
@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "backward"])
def test_a_wrong_product_ends_the_step(tmp_path: Path, tamper: Tampering, transpose: bool) -> None:
    architecture = ARCHITECTURES["gpt2"]
    inputs = batch((9, 4), 97)
    with serving(tmp_path) as worker:
        model = protect(architecture.build(torch.float32), str(worker.address), verify=1.0)
        adapted = with_lora(model, architecture).train()
        backward(adapted, inputs)  # honest so far
        verified = model.protection.stats.verified
        assert verified == model.protection.stats.crossings > 0
        tampered(worker, tamper, transpose=transpose)
        with pytest.raises(WrongProduct, match="times what rounding explains"):
            backward(adapted, inputs)
        assert model.protection.stats.retries == 0
        model.protection.close()


def test_without_verification_nothing_is_noticed(tmp_path: Path) -> None:
    """The control: the same tampering passes, and the output differs."""
    inputs = batch((9, 4), 97).inputs()
    with serving(tmp_path) as worker, torch.no_grad():
        model = protect(ARCHITECTURES["gpt2"].build(torch.float32), str(worker.address), verify=0.0)
        before = model(**inputs).logits
        tampered(worker, other_rows, transpose=False)
        assert not torch.allclose(model(**inputs).logits, before, atol=1e-2)
        model.protection.close()


def replied(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """From here on one element of every matrix that a worker replies with is this."""
    for place in (handlers, adapter_handlers):
        honest = place.product_of

        def product_of(request: Request, product: MatrixBuffer, honest: Any = honest) -> Any:
            product.matrix[-1, -1] = value
            return honest(request, product)

        monkeypatch.setattr(place, "product_of", product_of)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("verify", [0.0, 1.0], ids=["unverified", "verified"])
@pytest.mark.parametrize("lengths", [(1,), (9, 4), (60, 60)], ids=["one row", "few", "many"])
@pytest.mark.parametrize("profile", ["private", "paper"])
def test_what_is_not_finite_ends_the_pass(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    profile: str,
    lengths: tuple[int, ...],
    verify: float,
    value: float,
) -> None:
    inputs = batch(lengths, 97).inputs()
    with serving(tmp_path) as worker, torch.no_grad():
        plain = ARCHITECTURES["gpt2"].build(torch.float32)
        model = protect(plain, str(worker.address), profile=profile, verify=verify)
        model(**inputs)
        replied(monkeypatch, value)
        with pytest.raises(BadReply, match="the worker's product contains NaN or infinity"):
            model(**inputs)
        model.protection.close()


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "backward"])
def test_what_is_not_finite_comes_of_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    architecture, inputs = ARCHITECTURES["gpt2"], batch((9, 4), 97).inputs()
    with serving(tmp_path) as worker:
        model = protect(architecture.build(torch.float32), str(worker.address), profile="paper", verify=0.0)
        adapted = with_lora(model, architecture).train()
        model.protection.move_adapter(adapted)
        loss = adapted(**inputs).loss
        replied(monkeypatch, torch.nan)
        with pytest.raises(BadReply, match="the worker's product contains NaN or infinity"):
            if backwards:
                loss.backward()
            else:
                adapted(**inputs)
        model.protection.close()


@pytest.mark.parametrize("value", [1e30, -3e38, 1e6])
@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("lengths", [(4,), (60, 60)], ids=["few", "many"])
def test_what_no_rows_can_make_is_refused_whatever_the_lot_says(
    tmp_path: Path, lengths: tuple[int, ...], backwards: bool, value: float
) -> None:
    """One huge number that is finite: unmixed and rotated back it would become infinite, or swamp all others."""

    def one_huge(out: torch.Tensor) -> None:
        out[-1, -1] = value

    architecture, inputs = ARCHITECTURES["gpt2"], batch(lengths, 97)
    with serving(tmp_path) as worker:
        model = protect(architecture.build(torch.float32), str(worker.address), verify=1e-9)
        adapted = with_lora(model, architecture).train()
        backward(adapted, inputs)
        tampered(worker, one_huge, transpose=backwards)
        for _ in range(2):  # and it stays refused
            with pytest.raises(WrongProduct, match="times as large as the rows and the matrix can make it"):
                backward(adapted, inputs)
        assert model.protection.stats.verified == 0
        model.protection.close()
