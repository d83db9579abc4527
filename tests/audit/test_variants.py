"""Names of profiles with knobs."""

import pytest

from obfuscatune.audit.attackers import default_names, parse_variants
from obfuscatune.errors import ConfigError


def test_a_preset_and_one_with_a_knob() -> None:
    preset, changed = parse_variants("private, private:first_blocks=0:shield_rows=32")
    assert preset.profile.first_blocks == 1 and not preset.profile.allow_unsafe
    assert (changed.profile.first_blocks, changed.profile.shield_rows) == (0, 32)
    assert changed.name == "private:first_blocks=0:shield_rows=32"


def test_controls_hide_nothing() -> None:
    identity, rotation = parse_variants("identity,rotation")
    assert identity.profile.transform_spec.is_unsafe and not identity.profile.mixing
    assert not rotation.profile.transform_spec.is_unsafe and not rotation.profile.mixing


def test_the_defaults_can_all_be_audited() -> None:
    assert {"private", "identity"} <= {variant.name for variant in parse_variants(",".join(default_names()))}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", "unknown profile"),
        ("private:first_blocks", "KNOB=VALUE"),
        ("private:first_blocks=two", "takes int"),
        ("private:mixing=perhaps", "takes bool"),
        ("private:frst_blocks=2", "did you mean"),
        ("enclave", "nothing to audit"),
        (" , ", "names of profiles"),
    ],
)
def test_what_cannot_be_used_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_variants(text)
