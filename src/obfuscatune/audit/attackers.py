"""Which profiles are audited, and what each kind of attacker is given.

    private                    the preset
    private:first_blocks=0     the same with a knob changed
    identity, rotation         unsafe controls, on which attacks must succeed

An attacker has nothing, public text, the public base run on it, or some plain rows.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, OnDemand
from obfuscatune.audit.attacks.knowledge import Knowledge, KnownCall, PublicBase, PublicText, Scheme
from obfuscatune.audit.attacks.scoring import Truth
from obfuscatune.audit.attacks.weights import MOST_LAYERS
from obfuscatune.audit.scenario import Scenario, architecture
from obfuscatune.enclave.profiles import PRESETS, Profile, resolve
from obfuscatune.enclave.target_layers import LayerGroup, find_groups
from obfuscatune.errors import ConfigError

_BARE = {"mixing": False, "shield_rows": 0, "first_blocks": 0}
CONTROLS: dict[str, dict[str, Any]] = {
    "identity": {**_BARE, "transform": "identity"},
    "rotation": _BARE,
}
"""Of `private`: everything in the clear; one static rotation and nothing else."""


@dataclass(frozen=True)
class Variant:
    """A profile under the name that it was asked for by."""

    name: str
    profile: Profile


def default_names() -> list[str]:
    """Every preset that sends anything, and the controls."""
    presets = [name for name, profile in PRESETS.items() if profile.offload]
    return [*presets, "private:first_blocks=0", *CONTROLS]


def parse_variants(text: str) -> list[Variant]:
    """Read `NAME[:KNOB=VALUE]...[,NAME...]`.

    Raises:
        ConfigError: no such profile or knob, a value out of its range, or a profile that sends nothing.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError("--profile: expected names of profiles with commas between them")
    return [_parse(name) for name in names]


def _parse(name: str) -> Variant:
    preset, *settings = name.split(":")
    if preset in CONTROLS:
        knobs: dict[str, Any] = {**CONTROLS[preset], "allow_unsafe": True}
        preset = "private"
    else:
        knobs = {"allow_unsafe": True} if settings else {}
    profile = resolve(":".join([preset, *settings]), **knobs)
    if not profile.offload:
        raise ConfigError(f"--profile {name}: it sends nothing to a worker, there is nothing to audit")
    return Variant(name, profile)


KNOWN_TRAINING_CALLS = 24
DECOYS = 2
"""Documents that are in no call, for each that is."""


def equip(attacker: Attacker, scenario: Scenario, profile: Profile, truth: Truth) -> Knowledge:
    """What that attacker knows.

    Of the truth only the known plaintext is handed over, to who has it, and the training examples, among twice as many
    decoys and sorted, to who has the public base.
    """
    scheme = Scheme(profile.mixing, profile.shield_rows)
    text = PublicText(scenario.public, scenario.base.config.vocab_size)
    how = architecture(scenario.base, profile.first_blocks)
    match attacker:
        case Attacker.CLOSED:
            return Knowledge(attacker, scheme)
        case Attacker.PUBLIC_TEXT:
            return Knowledge(attacker, scheme, text=text, architecture=how)
        case Attacker.PUBLIC_BASE:
            base = public_base(scenario, profile.first_blocks)
            documents = _documents(scenario, truth)
            return Knowledge(attacker, scheme, text=text, architecture=how, base=base, documents=documents)
        case Attacker.KNOWN_PLAINTEXT:
            return Knowledge(attacker, scheme, plaintext=_known_calls(truth))


MOST_COVARIANCES = 2e7
"""Elements of the covariances of all layers: 160 MB, and minutes for a model with more."""


@lru_cache(maxsize=1)
def public_base(scenario: Scenario, first_blocks: int) -> PublicBase:
    """The base's matrices behind the first blocks, and what public text brings to each of them."""
    model = scenario.base
    groups = find_groups(model, first_blocks)
    inputs: list[Tensor] = []
    chosen = list(range(len(groups)))
    if sum(group.shape[0] ** 2 for group in groups) > MOST_COVARIANCES:
        chosen = [*chosen[:MOST_LAYERS], chosen[-1]]
    moments = {index: torch.zeros(groups[index].shape[0], groups[index].shape[0]).double() for index in chosen}
    hooks = []
    for index in chosen:

        def note(_module: Any, args: tuple[Tensor, ...], index: int = index) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            moments[index].addmm_(rows.T, rows)
            if index == 0:
                inputs.append(rows)

        hooks.append(model.get_submodule(groups[index].targets[0].path).register_forward_pre_hook(note))
    batch = torch.tensor(scenario.public)
    try:
        with torch.no_grad():
            for part in batch.split(32):
                model(input_ids=part, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    first = groups[0].targets[0].path
    return PublicBase(
        base_weights(model, first_blocks),
        torch.cat(inputs),
        {index: moment.div_(torch.trace(moment)) for index, moment in moments.items()},
        batch.reshape(-1),
        _head(model),
        lambda ids: _inputs_of(model, first, ids),
    )


class _Reached(Exception):
    """Ends a forward pass at the layer that was waited for."""


def _inputs_of(model: Any, path: str, ids: Tensor) -> Tensor:
    """What the module at `path` reads, (n, length, p) in float64, for token numbers (n, length)."""
    seen: list[Tensor] = []

    def stop(_module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].double())
        raise _Reached

    hook = model.get_submodule(path).register_forward_pre_hook(stop)
    try:
        with torch.no_grad(), suppress(_Reached):
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return seen[0].reshape(*ids.shape, -1)


def _head(model: Any) -> Tensor:
    """Output embeddings (V, width) times the scale of the last norm, in float64."""
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    with torch.no_grad():
        return torch.mul(model.get_output_embeddings().weight, norms[-1].weight).double()


def base_weights(model: Any, first_blocks: int) -> OnDemand:
    """W (p, q) of each group behind the first blocks, from a plain model, in float64."""

    def weight(group: LayerGroup) -> Tensor:
        with torch.no_grad():
            return group.joint_weight().double()

    return OnDemand([partial(weight, group) for group in find_groups(model, first_blocks)])


def _documents(scenario: Scenario, truth: Truth) -> tuple[tuple[int, ...], ...]:
    """The training examples and decoys from the text that the secret model was not tuned on, sorted."""
    trained = {call.tokens for call in truth.calls if call.phase == "training"}
    decoys = [text for text in scenario.held_out if text not in trained]
    return tuple(sorted([*trained, *decoys[: DECOYS * len(trained)]]))


def _known_calls(truth: Truth) -> tuple[KnownCall, ...]:
    """The first training calls of the first layer."""
    calls = [
        KnownCall(index, call.rows)
        for index, call in enumerate(truth.calls)
        if call.phase == "training" and call.layer == 0 and not call.transposed
    ]
    return tuple(calls[:KNOWN_TRAINING_CALLS])
