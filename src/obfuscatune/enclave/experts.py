"""Experts whose matrices lie on the worker: what takes the place of a module of experts in a protected model.

tokens, and the experts of each  ->  rows by expert  ->  one request for each expert that is hit, all under way at once
                                 ->  gate, in the enclave  ->  again one request each  ->  weighted sum for each token

The formula is that of `transformers.integrations.moe`, flag by flag:

    h_i = gate(x_i W_up[e] + b_up[e]),    y_i = h_i W_down[e] + b_down[e],    y = sum over a token's experts of w_i y_i

Routing weights stay in the enclave. The worker sees of each expert whether it is asked for and for how many rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from obfuscatune.enclave.autograd import outside_autocast
from obfuscatune.enclave.layers import SharedCrossing, no_elements
from obfuscatune.enclave.placeholder_tensors import AbsentWeight, refuse_weight
from obfuscatune.enclave.target_layers import experts_matrices
from obfuscatune.errors import ProtectionError

AT_ONCE = 32
"""Requests of one module that are under way at a time: their rows and products are in memory together."""


class ProtectedExperts(nn.Module):
    """A module of experts without its stacks of matrices; a subclass of the plain one's class too (`protected`)."""

    _crossings: dict[str, dict[int, SharedCrossing]]
    num_experts: int
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (n, d), top_k_index (n, k) and top_k_weights (n, k) -> (n, d)."""
        n, k = top_k_index.shape
        chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)  # (n k,): rows of one expert side by side
        experts, counts = torch.unique_consecutive(chosen, return_counts=True)
        used = [(int(e), int(count)) for e, count in zip(experts, counts, strict=True) if e < self.num_experts]
        order = order[: sum(count for _, count in used)]  # what is routed to no expert comes last, and counts as zero
        first, last = self._crossings
        x = hidden_states[order // k]
        x = self._multiply(first, x, used)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = self._multiply(last, x, used)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[order, None]
        y = x.new_zeros(n * k, x.shape[-1]).index_copy(0, order, x)
        return y.view(n, k, -1).sum(dim=1).to(hidden_states.dtype)

    def _multiply(self, name: str, x: Tensor, used: Sequence[tuple[int, int]]) -> Tensor:
        """x (m, p) -> x W[e] + b[e] (m, q): the rows of each expert `used` follow each other, as many as it says."""
        crossings, parts = self._crossings[name], []
        x = x.to(getattr(self, on_worker(name)).dtype)  # under autocast too, as the plain grouped product has it
        rows = x.split([count for _, count in used])
        for start in range(0, len(used), AT_ONCE):
            these = slice(start, start + AT_ONCE)
            with outside_autocast(x.device):
                calls = [crossings[e].begin(own) for (e, _), own in zip(used[these], rows[these], strict=True)]
                parts += [call.finish(None)[0] for call in calls]
        if not parts:
            return x.new_zeros(0, next(iter(crossings.values())).widths[0])
        y = torch.cat(parts)
        if self.has_bias:
            bias = getattr(self, f"{name}_bias")
            y = y + torch.cat([bias[e].expand(count, -1) for e, count in used])
        return y

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, as `nn.Module` does; a stack is refused."""
        if name in self._crossings:
            refuse_weight()
        super().register_parameter(name, param)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._crossings:
            del destination[prefix + on_worker(name)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        here = {prefix + on_worker(name): self._parameters[on_worker(name)] for name in self._crossings}
        super()._load_from_state_dict(state_dict | here, prefix, *rest)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise ProtectionError("protected experts cannot be copied: they hold a connection to the worker")


def has_experts(model: nn.Module) -> bool:
    """Whether a plain model has experts that would go to a worker one by one."""
    return any(experts_matrices(module) for module in model.modules())


def protected(plain: nn.Module, names: tuple[str, ...]) -> ProtectedExperts:
    """Make a module of experts without matrices, to replace the plain one; `add` then adds matrix after matrix.

    The plain module is not changed. The new one shares its other parameters, buffers and submodules.
    """
    shell: Any = copy.copy(plain)
    stacks: dict[str, Tensor] = {name: getattr(plain, name) for name in names}
    shell._parameters = {name: it for name, it in plain._parameters.items() if name not in stacks}
    shell._buffers, shell._modules = dict(plain._buffers), dict(plain._modules)
    cls: Any = type(plain)
    shell.__class__ = _protected_class(cls, tuple((name, stack.shape) for name, stack in stacks.items()))
    shell._crossings = {name: {} for name in names}
    for name, stack in stacks.items():
        device = "cpu" if stack.is_meta else stack.device
        shell.register_parameter(on_worker(name), no_elements(stack.numel(), stack.dtype, device))
    return shell  # type: ignore[no-any-return]


def on_worker(name: str) -> str:
    """The name of the parameter without elements that replaces a stack."""
    return f"_{name}_on_worker"


def add(experts: ProtectedExperts, name: str, index: int, crossing: SharedCrossing) -> None:
    """Add the matrix at `index` of the stack `name`; `crossing` multiplies by it."""
    experts._crossings[name][index] = crossing


@cache
def _protected_class(cls: Any, stacks: tuple[tuple[str, torch.Size], ...]) -> type:
    """A subclass of `cls` in which each stack is an `AbsentWeight`."""

    def reader(name: str, shape: torch.Size) -> Callable[[nn.Module], Tensor]:
        def read(self: nn.Module) -> Tensor:
            return AbsentWeight(shape, getattr(self, on_worker(name)))

        return read

    def refuse(self: object, value: object) -> NoReturn:
        refuse_weight()

    properties = {name: property(reader(name, shape), refuse) for name, shape in stacks}
    return type(f"Protected{cls.__name__}", (ProtectedExperts, cls), {"__module__": __name__, **properties})
