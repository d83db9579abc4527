"""Profiles: presets with single knobs changed, and everything else refused by name."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.enclave.profiles import PRESETS, Profile, resolve
from obfuscatune.errors import ConfigError

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "near miss": ({"sheild_rows": 3}, "did you mean 'shield_rows'"),
    "unknown": ({"colour": "red"}, "known are: transform, mixing, shield_rows"),
    "name": ({"name": "mine"}, "unknown knob 'name'"),
    "negative shield rows": ({"shield_rows": -1}, "between 0 and 65536, got -1"),
    "too many shield rows": ({"shield_rows": 65537}, "between 0 and 65536"),
    "negative first blocks": ({"first_blocks": -1}, "not be negative"),
    "no such transform": ({"transform": "harr"}, "unknown transform 'harr'"),
    "identity": ({"transform": "identity"}, "allow_unsafe"),
    "no mixing": ({"mixing": False}, "mixing=False sends every row .* allow_unsafe"),
    "one side": ({"sides": "paper"}, "sides='paper' leaves outputs plain .* allow_unsafe"),
    "public without masks": ({"public_base": True}, r"public_base=True \(--public-base\) needs one-time masks"),
    "no transform": ({"transform": "none"}, "'none' shows the weights .* profile 'guarded' and public_base=True"),
    "no such sides": ({"sides": "left"}, "sides is one of both, paper, not 'left'"),
    "nowhere": ({"lora_on": "moon"}, "lora_on is one of enclave, worker, not 'moon'"),
    "LoRA outside and mixing": ({"lora_on": "worker"}, "lora_on='worker' needs mixing=False and sides='paper'"),
    "no such wire dtype": ({"wire_dtype": "int8"}, "wire_dtype is one of model, bfloat16, not 'int8'"),
    "no shield rows": ({"shield_rows": 0}, "shield_rows=0 sends a row that crosses alone .* allow_unsafe"),
}


def test_private_is_what_the_design_says() -> None:
    profile = resolve("private")
    assert (profile.transform, profile.mixing, profile.first_blocks) == ("structured", True, 1)
    assert profile.shield_rows >= 1
    assert not profile.allow_unsafe


def test_paper_is_what_the_paper_says() -> None:
    profile = resolve("paper")
    assert (profile.transform, profile.mixing, profile.sides) == ("haar", False, "paper")
    assert (profile.lora_on, profile.first_blocks, profile.shield_rows) == ("worker", 0, 0)
    assert profile.is_as_published
    assert not resolve("private").is_as_published


@pytest.mark.parametrize("transform", ["gaussian", "conditioned(160)", "structured", "haar"])
def test_the_ablations_of_the_paper(transform: str) -> None:
    assert resolve("paper", transform=transform).transform == transform


def test_enclave_offloads_nothing() -> None:
    assert not resolve("enclave").offload
    assert all(resolve(name).offload for name in ("private", "paper"))


def test_knobs_may_stand_in_the_name() -> None:
    profile = resolve("private:first_blocks=2:verify=0.5:buckets=ladder:transform=haar", verify=1.0)
    assert profile == resolve("private", first_blocks=2, verify=1.0, buckets="ladder", transform="haar")


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("privat:verify=1", "unknown profile 'privat'"),
        ("private:verify", "expected KNOB=VALUE after the colon, found 'verify'"),
        ("private:verify=much", "verify takes float, found 'much'"),
        ("private:masks=1", "masks takes bool, found '1'"),
        ("private:first_blocks=1.5", "first_blocks takes int, found '1.5'"),
        ("private:colour=red", "unknown knob 'colour'"),
        ("private:mixing=false", "mixing=False sends every row"),
    ],
)
def test_a_wrong_knob_in_the_name_is_refused(profile: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(profile)


def test_what_trains_on_the_worker_keeps_its_precision() -> None:
    with pytest.raises(ConfigError, match="needs lora_on='enclave'"):
        resolve("paper:wire_dtype=bfloat16")


def test_knobs_change_one_thing() -> None:
    changed = resolve("private", shield_rows=32)
    assert changed.shield_rows == 32
    assert resolve(changed, transform="haar") == replace(resolve("private"), transform="haar", shield_rows=32)
    assert resolve("private").shield_rows != 32


def test_identity_only_when_asked_for_twice() -> None:
    assert resolve("private", transform="identity", allow_unsafe=True).transform_spec.is_unsafe


@pytest.mark.parametrize("knobs", [{"mixing": False}, {"shield_rows": 0}])
def test_what_weakens_only_when_asked_for_twice(knobs: dict[str, Any]) -> None:
    profile = resolve("private", **knobs, allow_unsafe=True)
    assert all(getattr(profile, knob) == value for knob, value in knobs.items())


@pytest.mark.parametrize(("knobs", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve("private", **knobs)


def test_identity_is_refused_in_the_paper_too() -> None:
    with pytest.raises(ConfigError, match="allow_unsafe"):
        resolve("paper", transform="identity")


def test_a_public_base_needs_no_transform() -> None:
    profile = resolve("guarded:public_base=true")
    assert profile == resolve("guarded", public_base=True)
    assert (profile.transform, profile.serves_published) == ("none", True)
    assert resolve("guarded", public_base=False) == resolve("guarded")
    rotated = resolve("guarded", public_base=True, transform="haar")
    assert (rotated.transform, rotated.serves_published) == ("haar", False)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"transform": "none"}, "public_base=True"),
        ({"public_base": True, "transform": "identity"}, "allow_unsafe"),
        ({"public_base": True, "rekey_every": 3}, "no secrets to renew"),
    ],
)
def test_what_is_refused_under_masks(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve("guarded", **knobs)


def test_unknown_profile() -> None:
    with pytest.raises(ConfigError, match=r"unknown profile 'paranoid'.*private"):
        resolve("paranoid")


def test_the_docs_have_every_knob_as_the_presets_have_it() -> None:
    page = (Path(__file__).parents[2] / "docs" / "profiles.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", page, re.MULTILINE)
    knobs = {field.name for field in fields(Profile)} - {"name", "offload", "allow_unsafe"}
    assert {knob for knob, *_ in rows} == knobs
    for knob, *cells in rows:
        for name, cell in zip(("private", "guarded", "paper"), map(str.strip, cells), strict=True):
            value = getattr(PRESETS[name], knob)
            said = {"yes": True, "no": False, "1/16": 1 / 16}.get(cell, cell)
            assert not cell or str(said) in (str(value), str(value).removesuffix(".0"))
