"""Profiles: presets of independent knobs, resolved once, before anything is sent.

    profile="private"  ->  resolve("private", first_blocks=2)  ->  Profile(...)  ->  parts that are composed
    profile="private:first_blocks=2:verify=1"        the same in one word, wherever the name of a profile may stand

    private   the default: rows mixed afresh, both sides rotated, LoRA in the enclave
    guarded   the same under one-time masks, whose products another worker makes that does not collude with the first:
              activations are hidden with a proven bound, and every product is verified (docs/guarded.md)
    paper     ObfuscaTune as published: one static rotation on one side, LoRA on the worker; weaker (docs/paper.md)
    enclave   nothing leaves: what the others are measured against

A later profile is a further row of `PRESETS`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

import torch

from obfuscatune.enclave.transforms import TransformSpec
from obfuscatune.errors import ConfigError

Buckets = Literal["ladder", "none"]
Sides = Literal["both", "paper"]
LoraOn = Literal["enclave", "worker"]
WireDtype = Literal["model", "bfloat16"]


@dataclass(frozen=True)
class Profile:
    """How a model is protected.

    Attributes:
        name: the preset that it came from.
        transform: kind of R_in and R_out: structured, haar, gaussian, conditioned(KAPPA), none, identity.
        mixing: whether rows are mixed afresh at each crossing.
        shield_rows: random rows mixed in at each crossing, at least; ignored without mixing.
        masks: whether rows are hidden under one-time masks, whose products a second worker makes.
        public_base: whether the model's weights are published themselves, so that there is nothing to hide of them:
            transform is then none, and workers may have the weights from elsewhere. It takes masks.
        buckets: to how many rows requests are filled up: `ladder`, to the next power of two or three halves of one, so
            that a worker sees a bucket of lengths and no length; `none`, not at all.
        first_blocks: how many of the first blocks stay in the enclave. In the first, rows follow from single tokens,
            and a worker sees which of them are equal (docs/threat-model.md).
        sides: which sides of a matrix are rotated: `both`, or as in the `paper`: the input of layers that read the
            residual stream, whose outputs are then plain outside, and the output of layers that write to it.
        lora_on: where LoRA's factors, their gradients and the optimizer's state are, once the adapter was moved.
        wire_dtype: in which matrices, rows and products cross. `model`: in the model's dtype; those of a bfloat16 model
            in float16, as many bytes with three bits more, since rows that are scaled, rotated and mixed have no
            outliers. `bfloat16`: half the bytes of float32 and, where the worker's processor has units for it, several
            times the speed, for three significant digits.
        offload: whether anything goes to a worker at all.
        verify: share of the products, drawn by lot, that are held against secret vectors (docs/verification.md).
        rekey_every: steps of the optimizer within which the transforms of all layers are drawn anew; 0 is never.
        allow_unsafe: permits settings that do not keep the promise; for tests and positive controls.
    """

    name: str
    transform: str = "structured"
    mixing: bool = True
    shield_rows: int = 8
    masks: bool = False
    public_base: bool = False
    buckets: Buckets = "none"
    first_blocks: int = 0
    sides: Sides = "both"
    lora_on: LoraOn = "enclave"
    wire_dtype: WireDtype = "model"
    offload: bool = True
    verify: float = 0.0
    rekey_every: int = 0
    allow_unsafe: bool = False

    def __post_init__(self) -> None:
        if self.shield_rows < 0 or self.shield_rows > 65536:
            raise ConfigError(f"shield_rows must be between 0 and 65536, got {self.shield_rows}")
        if self.first_blocks < 0:
            raise ConfigError(f"first_blocks must not be negative, got {self.first_blocks}")
        if self.rekey_every < 0:
            raise ConfigError(f"rekey_every is a number of steps, 0 for never; got {self.rekey_every}")
        if not 0 <= self.verify <= 1:
            raise ConfigError(f"verify is a share between 0 and 1, got {self.verify}")
        for knob, known in (("sides", Sides), ("buckets", Buckets), ("lora_on", LoraOn), ("wire_dtype", WireDtype)):
            value = getattr(self, knob)
            if value not in get_args(known):
                raise ConfigError(f"{knob} is one of {', '.join(get_args(known))}, not {value!r}")
        if self.lora_on == "worker" and self.wire_dtype != "model":
            raise ConfigError("wire_dtype='bfloat16' needs lora_on='enclave': what trains keeps its precision")
        if self.masks and not (self.mixing and self.verify == 1 and self.wire_dtype == "model" and self.offload):
            raise ConfigError(
                "masks=True needs mixing=True, verify=1 and wire_dtype='model': without mixing two workers that "
                "collude see every row, an unverified product of either would pass, and masked rows take float64"
            )
        if self.public_base and not self.masks:
            raise ConfigError(
                f"public_base=True (--public-base) needs one-time masks, which profile {self.name!r} does not have: "
                "without them a worker that knows the weights reads the text; use profile 'guarded'"
            )
        if self.transform == "none" and self.rekey_every:
            raise ConfigError("transform 'none' has no secrets to renew: leave out rekey_every")
        if self.lora_on == "worker" and (self.mixing or self.sides != "paper"):
            raise ConfigError(
                "lora_on='worker' needs mixing=False and sides='paper': a factor's gradient is a product of rows that "
                "were sent apart, and of the columns of one layer; use profile 'paper', or lora_on='enclave'"
            )
        if not self.allow_unsafe:
            self._refuse_unsafe()

    @property
    def is_as_published(self) -> bool:
        """Whether it is the paper's scheme: chosen by that name, and weaker than `private` on purpose."""
        return self.name == AS_PUBLISHED

    def _refuse_unsafe(self) -> None:
        if self.transform_spec.is_unsafe:
            raise ConfigError(
                "transform 'identity' protects nothing and is refused; tests and controls pass allow_unsafe=True"
            )
        if self.transform == "none" and not self.public_base:
            raise ConfigError(
                "transform 'none' shows the weights to the workers: it takes profile 'guarded' and public_base=True "
                "(--public-base), which says that they are published"
            )
        if self.is_as_published:
            return
        if self.sides == "paper":
            raise ConfigError(
                "sides='paper' leaves outputs plain on the worker; it is refused outside profile 'paper', "
                "tests and controls pass allow_unsafe=True"
            )
        if not self.mixing or self.shield_rows == 0:
            knob, rows = ("shield_rows=0", "a row that crosses alone") if self.mixing else ("mixing=False", "every row")
            raise ConfigError(
                f"{knob} sends {rows} under one static rotation, where equal rows are seen to be equal; "
                "it is refused, tests and controls pass allow_unsafe=True"
            )

    def crossing_dtype(self, model: torch.dtype) -> torch.dtype:
        """In which matrices of a model of that dtype cross, and rows that no mask hides; masked rows have float64."""
        if self.masks:
            return torch.promote_types(model, torch.float32)
        if self.wire_dtype == "bfloat16":
            return torch.bfloat16
        return torch.float16 if model == torch.bfloat16 and self.mixing else model

    @property
    def serves_published(self) -> bool:
        """Whether workers hold the published weights as they are."""
        return self.public_base and self.transform == "none"

    @property
    def transform_spec(self) -> TransformSpec:
        """The transform, parsed."""
        return TransformSpec.parse(self.transform)


AS_PUBLISHED = "paper"
PRESETS = {
    profile.name: profile
    for profile in (
        Profile("private", first_blocks=1, verify=1 / 16),
        Profile("guarded", masks=True, buckets="ladder", first_blocks=1, verify=1.0),
        Profile(AS_PUBLISHED, transform="haar", mixing=False, shield_rows=0, sides="paper", lora_on="worker"),
        Profile("enclave", offload=False),
    )
}


def resolve(profile: str | Profile, **knobs: Any) -> Profile:
    """The preset of that name (or the profile itself), with single knobs changed.

    Args:
        profile: `NAME[:KNOB=VALUE]...`.
        knobs: likewise; what stands here wins.

    Raises:
        ConfigError: no such profile or knob, or a knob out of its range.
    """
    if isinstance(profile, str):
        name, *settings = profile.split(":")
        if name not in PRESETS:
            raise ConfigError(f"unknown profile {name!r}; this version has: {', '.join(PRESETS)}")
        knobs = dict(_setting(profile, setting) for setting in settings) | knobs
        profile = PRESETS[name]
    known = [field.name for field in fields(Profile) if field.name != "name"]
    for knob in knobs:
        if knob not in known:
            near = get_close_matches(knob, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are: {', '.join(known)}"
            raise ConfigError(f"unknown knob {knob!r} of a profile{hint}")
    if knobs.get("public_base"):
        knobs = {"transform": "none"} | knobs
    return replace(profile, **knobs)


def _setting(profile: str, setting: str) -> tuple[str, Any]:
    """KNOB=VALUE as a knob and its value; one that is not known is left for `resolve` to refuse."""
    knob, separator, text = setting.partition("=")
    if not separator:
        raise ConfigError(f"profile {profile!r}: expected KNOB=VALUE after the colon, found {setting!r}")
    kind = {field.name: str(field.type) for field in fields(Profile)}.get(knob, "str")
    try:
        match kind:
            case "bool":
                return knob, {"true": True, "false": False}[text.lower()]
            case "int":
                return knob, int(text)
            case "float":
                return knob, float(text)
    except (KeyError, ValueError):
        raise ConfigError(f"profile {profile!r}: {knob} takes {kind}, found {text!r}") from None
    return knob, text
