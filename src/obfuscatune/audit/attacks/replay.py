"""What a worker computes for an adapter that it holds, again from the transcript: gradients of A* and B*, step by step.

    h = x* A*      dB* = s hᵀ g*      dA* = x*ᵀ (s g* B*ᵀ)

The worker's dropout is not in the transcript, so it is left out: a worker that attacks has the exact gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import CannotRun
from obfuscatune.audit.attacks.view import Factors, HeldAdapter, SeenCall, WorkerView
from obfuscatune.protocol.payloads import Method, Part, Step


@dataclass(frozen=True)
class StepGradients:
    """Gradients of one step's factors, all slices of a layer together, and the forward calls that they came from."""

    calls: tuple[int, ...]
    A: Tensor
    """(p, sum of ranks)."""
    B: Tensor
    """(sum of ranks, q): each slice's rows are zero outside its columns."""


@dataclass(frozen=True)
class Replay:
    """A layer's adapter through training."""

    steps: tuple[StepGradients, ...]
    factors: Factors
    """In the end."""


def replay(view: WorkerView, layer: int) -> Replay:
    """Train a layer's adapter again.

    Raises:
        CannotRun: the worker holds none for it, or it came there in the middle of the training.
    """
    adapter = next((it for it in view.adapters if it.layer == layer), None)
    if adapter is None:
        raise CannotRun("no adapter lies on the worker")
    steps = [step for step in view.steps if step.after > adapter.since]
    if not steps or steps[0].settings.number != 1:
        raise CannotRun("the adapter came to the worker after the training had begun")
    copy = _Copy(adapter, view.matrices[view.forward(layer)[-1].matrix].W_star.shape[1])
    calls = iter([call for call in view.calls[adapter.since :] if call.layer == layer])
    done: list[StepGradients] = []
    call = next(calls, None)
    for step in steps:
        while call is not None and call.index < step.after:
            copy.take(call)
            call = next(calls, None)
        done.append(copy.step(step.settings))
    return Replay(tuple(done), copy.factors)


class _Copy:
    """The adapter as the worker has it."""

    def __init__(self, adapter: HeldAdapter, q: int) -> None:
        self._adapter, self._q = adapter, q
        self.factors = {key: adapter.put[key].clone() for key in adapter.put if key[1] in (Part.A, Part.B)}
        self._optimizer: torch.optim.Optimizer | None = None
        self._clear()

    def take(self, call: SeenCall) -> None:
        """Remember a forward call that will come back; add up the gradients of one that does."""
        if not call.transposed:
            self._inputs[call.number] = call
            return
        forward = self._inputs.pop(call.number)
        self._calls.append(forward.index)
        x, g = forward.rows, call.rows
        for index, it in enumerate(self._adapter.slices):
            part = it.scale * g[:, it.first : it.first + it.width]
            A, B = self.factors[index, Part.A], self.factors[index, Part.B]
            self._gradients[index, Part.A] += x.T @ (part @ B.T)
            self._gradients[index, Part.B] += (x @ A).T @ part

    def step(self, settings: Step) -> StepGradients:
        """Take a step, and begin anew."""
        seen = StepGradients(tuple(self._calls), self._side_by_side(), self._above_one_another())
        for key, factor in self.factors.items():
            factor.grad = settings.gradient_scale * self._gradients[key]
        optimizer = self._optimizer = self._optimizer or _optimizer(list(self.factors.values()), settings)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr
        optimizer.step()
        self._clear()
        return seen

    def _clear(self) -> None:
        self._gradients = {key: torch.zeros_like(factor) for key, factor in self.factors.items()}
        self._inputs: dict[int, SeenCall] = {}
        self._calls: list[int] = []

    def _side_by_side(self) -> Tensor:
        return torch.cat([self._gradients[index, Part.A] for index in range(len(self._adapter.slices))], dim=1)

    def _above_one_another(self) -> Tensor:
        rows = []
        for index, it in enumerate(self._adapter.slices):
            before, after = it.first, self._q - it.first - it.width
            rows.append(torch.nn.functional.pad(self._gradients[index, Part.B], (before, after)))
        return torch.cat(rows)


def _optimizer(factors: list[Tensor], settings: Step) -> torch.optim.Optimizer:
    if settings.method is Method.SGD:
        return torch.optim.SGD(factors, lr=settings.lr, weight_decay=settings.weight_decay)
    betas = settings.beta1, settings.beta2
    return torch.optim.AdamW(factors, lr=settings.lr, betas=betas, eps=settings.eps, weight_decay=settings.weight_decay)
