"""Names tell what reads the residual stream, then shapes, and then nothing is guessed."""

from __future__ import annotations

import pytest

from obfuscatune.enclave.target_layers import residual_role
from obfuscatune.errors import ProtectionError

NAMED = {
    "h.0.attn.c_attn": "reads",
    "h.0.attn.c_proj": "writes",
    "h.0.mlp.c_fc": "reads",
    "encoder.layer.0.attention.output.dense": "writes",
    "encoder.layer.0.intermediate.dense": "reads",
    "encoder.layer.0.output.dense": "writes",
    "layers.0.attention.dense": "writes",
    "layers.0.mlp.down_proj": "writes",
    "layers.0.mlp.up_proj": "reads",
}


@pytest.mark.parametrize(("name", "side"), NAMED.items())
def test_names(name: str, side: str) -> None:
    assert residual_role(name, 8, 8, None) == side


def test_shapes_where_names_are_new() -> None:
    assert residual_role("h.0.expand", 8, 20, 8) == "reads"
    assert residual_role("h.0.shrink", 20, 8, 8) == "writes"


@pytest.mark.parametrize(("p", "q", "width"), [(8, 8, 8), (5, 7, 8), (8, 20, None)])
def test_nothing_is_guessed(p: int, q: int, width: int | None) -> None:
    with pytest.raises(ProtectionError, match=r"h\.0\.mystery .* neither its name nor its shape"):
        residual_role("h.0.mystery", p, q, width)
