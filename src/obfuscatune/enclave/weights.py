"""The tensors of a model in its files, found as transformers 5 finds them.

name in the model  ->  what it is made of: one stored tensor, or several and transformers' own `WeightConverter`
                   ->  the tensor, read when it is asked for

Files may call a tensor otherwise than the model does, or hold its parts: experts one by one that the model stacks,
q, k and v that it fuses. `core_model_loading` of transformers knows which; what is done with them is its code.
"""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.checkpoint import Checkpoint
from obfuscatune.enclave.config import as_model_file_error, initialize, set_tensor
from obfuscatune.enclave.target_layers import Expert, LayerGroup
from obfuscatune.errors import ModelFileError


@dataclass
class _Recipe:
    """What a parameter is made of: stored names by the converter's source pattern; one name where there is none."""

    name: str
    converter: WeightConverter | None
    parts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def stored(self) -> str:
        """The one stored tensor that the parameter is, where nothing is converted."""
        return next(iter(self.parts))

    def stacks_experts(self) -> bool:
        """Whether the parts of each pattern are stacked along dimension 0 and that one is left alone afterwards."""
        if self.converter is None:
            return False
        first, *others = self.converter.operations
        return (
            type(first) is MergeModulelist
            and first.dim == 0
            and all(
                (type(op) is Concatenate and op.dim > 0) or (type(op) is Transpose and min(op.dim0, op.dim1) > 0)
                for op in others
            )
        )


class StoredWeights:
    """Reads a model's parameters and persistent buffers by their names in the model. Safe from any thread.

    Raises:
        ModelFileError: something that the model needs is not in the files, or not as the configuration says.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self._checkpoint = checkpoint
        self._model_ref = weakref.ref(model)  # the link keeps this for as long as the model lives, and no longer
        self._expected = model.state_dict(keep_vars=True)
        with as_model_file_error("the names in the model's files"):
            recipes = self._find_recipes()
        self._recipes = {target: recipe for recipe in recipes for target in self._check(recipe)}
        pairs = getattr(model, "all_tied_weights_keys", {}).items()
        self._tied = {name: other for pair in pairs for name, other in (pair, pair[::-1])}
        self._new = self._newly_initialised()

    @property
    def _model(self) -> PreTrainedModel:
        model = self._model_ref()
        if model is None:
            raise ModelFileError("the model whose weights are to be read again is gone")
        return model

    def joint_weight(self, group: LayerGroup, W: Tensor | None = None) -> Tensor:
        """W (p, q) of a group: the weights of layers that share an input side by side, y = x W.

        Args:
            W: what is to hold it; memory of its own if None.
        """
        if W is None:
            W = torch.empty(group.shape, dtype=group.dtype)
        for target, own in zip(group.targets, W.split(list(group.widths), dim=1), strict=True):
            if isinstance(target.layer, Expert):
                own.copy_(target.layer.oriented(self._one_of(target.parameter, target.layer.index)))
            else:
                self._read_into(f"{target.name}.weight", own if isinstance(target.layer, Conv1D) else own.T)
        return W

    def fill(self, offloaded: list[LayerGroup]) -> None:
        """Read all of the model but the offloaded weights, tie what is tied, and initialise a head that is new."""
        model = self._model
        away = {target.parameter for group in offloaded for target in group.targets}
        missing = set(self._new)
        for name in self._new:
            set_tensor(model, name, torch.empty_like(self._expected[name], device="cpu"))
        if self._new:
            initialize(model)
        for name, like in self._expected.items():
            if name in away or name in self._new:
                continue
            if name in self._recipes:
                set_tensor(model, name, self._kept(name).to(like.dtype))
            elif self._tied[name] in away:
                set_tensor(model, name, self._read(self._tied[name]).to(like.dtype))
            else:
                missing.add(name)
        ties = model.all_tied_weights_keys
        model.all_tied_weights_keys = {t: s for t, s in ties.items() if t not in away and s not in away}
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        if self._new:
            warnings.warn(
                f"newly initialised, for the files do not hold them: {', '.join(sorted(self._new))}. "
                "Train the model before it is used",
                stacklevel=3,
            )

    def _find_recipes(self) -> list[_Recipe]:
        """The loop of transformers' `convert_and_load_state_dict_in_model`, over names alone."""
        conversions = get_model_conversion_mapping(self._model)
        renamings = [it for it in conversions if isinstance(it, WeightRenaming)]
        converters = [it for it in conversions if isinstance(it, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, expected = self._model.base_model_prefix, self._expected
        recipes: dict[str, _Recipe] = {}
        for stored in sorted(self._checkpoint.names(), key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, expected)
            if name not in expected and stored in expected:
                name, pattern = rename_source_key(stored, [], [], prefix, expected)
            if name in expected:
                converter = None if pattern is None else by_pattern[pattern]
                recipe = recipes.setdefault(name, _Recipe(name, converter))
                recipe.parts[pattern or stored].append(stored)
        return list(recipes.values())

    def _check(self, recipe: _Recipe) -> list[str]:
        """The parameters that a recipe makes, which must fit the model. Nothing is read."""
        if recipe.converter is None:
            like = self._expected[recipe.name]
            self._checkpoint.check(recipe.stored, like.shape, like.dtype)
            return [recipe.name]
        parts = {pattern: [self._checkpoint.like(it) for it in names] for pattern, names in recipe.parts.items()}
        with as_model_file_error(f"what the model's files hold for {recipe.name}"):
            made = self._convert(recipe, parts)
        for name, tensor in made.items():
            if name not in self._expected or tensor.shape != self._expected[name].shape:
                wanted = tuple(self._expected[name].shape) if name in self._expected else "no such tensor"
                raise ModelFileError(
                    f"the model's files give tensor {name!r} the shape {tuple(tensor.shape)}, the config says {wanted}"
                )
        return list(made)

    def _newly_initialised(self) -> set[str]:
        """What the files lack and the architecture starts with by itself: a head that other files would hold.

        Raises:
            ModelFileError: something else is lacking.
        """
        model = self._model
        known, ignored = self._recipes, set(model._keys_to_ignore_on_load_missing or ())
        absent = [name for name in self._expected if name not in known and self._tied.get(name) not in known]
        written_by_another = type(model).__name__ not in (model.config.architectures or [])
        base = f"{model.base_model_prefix}."
        for name in absent:
            in_head = (model.base_model is not model and not name.startswith(base)) or ".pooler." in f".{name}"
            by_rule = any(re.search(pattern, name) for pattern in ignored)
            is_buffer = not isinstance(self._expected[name], torch.nn.Parameter)
            if not (by_rule or is_buffer or (written_by_another and in_head)):
                raise ModelFileError(f"tensor {name!r} is missing from the model's files")
        return set(absent)

    def _convert(self, recipe: _Recipe, parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        converter = copy.deepcopy(recipe.converter)
        if converter is None:
            raise ModelFileError(f"tensor {recipe.name!r} is stored as it is")
        for pattern, tensors in parts.items():
            converter.collected_tensors[pattern] = tensors
        made = converter.convert(recipe.name, model=self._model, config=self._model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def _kept(self, name: str) -> Tensor:
        """A tensor that stays in this process: mapped from its file where it is very large and stored as it is used."""
        recipe = self._recipe(name)
        if recipe.converter is not None:
            return self._read(name)
        like = self._expected[recipe.name]
        return self._checkpoint.mapped(recipe.stored, like.shape, like.dtype)

    def _read(self, name: str) -> Tensor:
        recipe = self._recipe(name)
        if recipe.converter is None:
            like = self._expected[recipe.name]
            return self._checkpoint.read(recipe.stored, like.shape, like.dtype)
        parts = {pattern: [self._part(it, name) for it in names] for pattern, names in recipe.parts.items()}
        return self._convert(recipe, parts)[name]

    def _read_into(self, name: str, target: Tensor) -> None:
        recipe = self._recipe(name)
        if recipe.converter is None:
            self._checkpoint.read_into(recipe.stored, target)
        else:
            target.copy_(self._read(name))

    def _one_of(self, name: str, index: int) -> Tensor:
        """The matrix at `index` of a stack of matrices: no other expert is read where the files allow it."""
        recipe = self._recipe(name)
        if recipe.converter is None:
            return self._checkpoint.read_one_of(recipe.stored, self._expected[recipe.name].shape, index)
        if recipe.stacks_experts():
            parts = {pattern: [self._part(names[index], name)] for pattern, names in recipe.parts.items()}
            return self._convert(recipe, parts)[name][0]
        return self._read(name)[index]

    def _part(self, stored: str, name: str) -> Tensor:
        shape = self._checkpoint.like(stored).shape
        return self._checkpoint.read(stored, shape, self._expected[name].dtype)

    def _recipe(self, name: str) -> _Recipe:
        return self._recipes[name if name in self._recipes else self._tied[name]]
