"""Which layers' weights a model's own code reads, beside calling the layer: `F.linear(x, self.proj.weight)`, say.

Such a weight cannot lie on the worker. The source of the model's classes tells, before anything is sent. Reading what a
weight is like (`self.proj.weight.dtype`) does no harm; setting it up (`__init__`, `_init_weights`) is over by then; and
what is done `if pretraining_tp > 1` counts where the configuration says so.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache

from torch import nn

_ANSWERED = {
    "shape",
    "dtype",
    "device",
    "size",
    "dim",
    "ndim",
    "numel",
    "is_meta",
    "requires_grad",
    "is_floating_point",
}
_BEFORE_USE = {"__init__", "_init_weights", "init_weights", "reset_parameters", "tie_weights"}
_OF_LIBRARIES = (
    *("builtins.", "torch.", "peft.", "accelerate.", "obfuscatune."),
    *("transformers.modeling_", "transformers.generation.", "transformers.integrations.", "transformers.utils."),
)
"""Their code is the same for every model."""


def find_weight_reads(model: nn.Module) -> dict[str, str]:
    """Layers whose weight is read, by dotted path, each with the name of the class whose code does so."""
    modules = dict(model.named_modules())
    config = getattr(model, "config", None)
    sliced = int(getattr(config, "pretraining_tp", None) or 1) > 1
    reads: dict[str, str] = {}
    for path, module in modules.items():
        for chain in _reads_of(type(module), sliced):
            base, *attributes = chain
            if base == "self":
                reads[".".join([*([path] if path else []), *attributes])] = type(module).__name__
                continue
            ending = "." + ".".join(attributes or [base])
            reads |= {other: type(module).__name__ for other in modules if f".{other}".endswith(ending)}
    return reads


def _reads_of(cls: type, sliced: bool) -> frozenset[tuple[str, ...]]:
    """`("self", "proj")` for `self.proj.weight` in any method of a class or of those that it inherits from."""
    kinds = [kind for kind in cls.__mro__ if not f"{kind.__module__}.".startswith(_OF_LIBRARIES)]
    return frozenset().union(*(_reads_in(kind.__module__, sliced).get(kind.__name__, frozenset()) for kind in kinds))


@cache
def _reads_in(module: str, sliced: bool) -> dict[str, frozenset[tuple[str, ...]]]:
    """For each class of a Python module what its methods read. Empty without source, as in an interpreter."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError, KeyError):
        return {}
    reads = {}
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        functions = [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name not in _BEFORE_USE]
        reads[kind.name] = frozenset(chain for function in functions for chain in _chains(function, sliced))
    return reads


def _chains(function: ast.FunctionDef, sliced: bool) -> Iterator[tuple[str, ...]]:
    harmless = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in _ANSWERED:
            harmless.add(id(node.value))
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr")
        ):
            harmless |= {id(argument) for argument in node.args}
        elif isinstance(node, ast.If) and not sliced and "pretraining_tp" in ast.unparse(node.test):
            harmless |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            harmless.add(id(node.left))
    for node in ast.walk(function):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
            continue
        chain = _names(node.value)
        if id(node) not in harmless and chain and chain != ("self",):
            yield chain


def _names(node: ast.expr) -> tuple[str, ...]:
    """("self", "a", "b") of `self.a.b`; empty for anything else."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (names := _names(node.value)):
        return (*names, node.attr)
    return ()
