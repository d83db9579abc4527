"""How far a protected model's logits are from the plain ones, by depth and number format.

    error = |logits - reference|_F / |logits of the reference|_F

The reference is the plain model of the same weights in float64. So the plain model has an error too, that of the number
format alone, and a protected one is read beside it. A depth of d is the model with its first d blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from obfuscatune.assets import clinic_notes_path
from obfuscatune.bench.workload import config_of, random_model
from obfuscatune.evaluation.questions import load_completions
from obfuscatune.reproduction.cells import Cell, Watch
from obfuscatune.reproduction.opening import Opening, Subject
from obfuscatune.reproduction.presets import Preset, ShapeDepth, find_method
from obfuscatune.training.run import load_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEED = 0


@dataclass(frozen=True)
class ErrorStudy:
    """What all cells of the error share."""

    subject: Subject
    opening: Opening
    preset: Preset

    def of_shape(self, shape: ShapeDepth, method: str) -> Cell:
        """Random weights and random tokens: what rounding does needs no knowledge."""

        def make() -> PreTrainedModel:
            return random_model(config_of(shape.shape, shape.layers)).eval()

        def draw(model: PreTrainedModel) -> torch.Tensor:
            generator = torch.Generator().manual_seed(_SEED)
            return torch.randint(model.config.vocab_size, (1, self.preset.error_tokens), generator=generator)

        return self._cell(shape.shape, {"shape": shape.shape, "layers": shape.layers}, method, make, draw)

    def of_subject(self, method: str) -> Cell:
        """The trained model, on English text."""

        def make() -> PreTrainedModel:
            return load_plain(self.subject.directory, self.subject.config, torch.float32).eval()

        def read(_: PreTrainedModel) -> torch.Tensor:
            notes = load_completions(clinic_notes_path() / "heldout.jsonl", limit=self.preset.error_tokens)
            text = "\n".join(note.prompt + note.completion for note in notes)
            ids = self.subject.tokenizer(text)["input_ids"][: self.preset.error_tokens]
            return torch.tensor([ids])

        return self._cell("trained model", {"model": self.subject.fingerprint}, method, make, read)

    def _cell(
        self,
        name: str,
        settings: Mapping[str, Any],
        method: str,
        make: Callable[[], PreTrainedModel],
        tokens: Callable[[PreTrainedModel], torch.Tensor],
    ) -> Cell:
        dtypes = {name: getattr(torch, name) for name in ("float32", *self.preset.sixteen_bits)}
        settings = {
            **settings,
            "method": method,
            "protection": find_method(method).resolved,
            "tokens": self.preset.error_tokens,
            "depths": self.preset.depths,
            "dtypes": list(dtypes),
        }

        def measure(watch: Watch) -> Mapping[str, Any]:
            with watch(f"error of {name}, {method}") as meter:
                meter.expect(1 + len(dtypes))
                plain = make()
                ids = tokens(plain)
                depths = [depth for depth in self.preset.depths if depth <= len(_blocks(plain)[1])]
                reference = logits_by_depth(deepcopy(plain).double(), ids, depths)
                meter.advance(1)
                errors = {}
                for dtype_name, dtype in dtypes.items():
                    copy = deepcopy(plain).to(dtype)
                    with self.opening.protected(copy, find_method(method)) as model:
                        errors[dtype_name] = _errors(logits_by_depth(model, ids, depths), reference)
                    meter.advance(1)
            return {"depths": depths, "errors": errors}

        return Cell("error", f"{name} {method}", settings, measure)


@torch.no_grad()
def logits_by_depth(model: PreTrainedModel, ids: torch.Tensor, depths: Sequence[int]) -> list[torch.Tensor]:
    """Logits in float64 of the model with its first d blocks, for every d."""
    stem, blocks = _blocks(model)
    found = []
    for depth in depths:
        with _replaced(model, stem, nn.ModuleList(list(blocks)[:depth])):
            found.append(model(input_ids=ids, use_cache=False).logits.double())
    return found


def _blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Where the blocks are: the outermost `ModuleList`."""
    return next((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


@contextmanager
def _replaced(model: nn.Module, path: str, module: nn.Module) -> Iterator[None]:
    whole = model.get_submodule(path)
    model.set_submodule(path, module)
    try:
        yield
    finally:
        model.set_submodule(path, whole)


def _errors(logits: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[float]:
    return [float((one - true).norm() / true.norm()) for one, true in zip(logits, reference, strict=True)]
