"""Which side of a layer the paper's scheme rotates: does it read the residual stream, or write to it?

    reads     q, k, v; gate, up, fc1     X* = X R_a, W* = R_a⁻¹ W       outputs plain outside
    writes    attention output, fc2      W* = W R_b                     inputs plain outside, O = O* R_b⁻¹

Hugging Face's names tell. A name that is not known here goes by its shape: from the model's width to another
it reads, from another to that width it writes. Where neither tells, nothing is guessed.
"""

from __future__ import annotations

import re
from typing import Literal

from obfuscatune.wire.errors import ProtectionError

ResidualSide = Literal["reads", "writes"]

_LEAF = r"(?:^|\.)(?:{})$"
READS = re.compile(
    _LEAF.format(
        r"[qkv]_proj|query|key|value|[qkv]_lin|query_key_value|qkv_proj|Wqkv|c_attn|q_attn|qkv|in_proj"
        r"|gate_proj|up_proj|gate_up_proj|c_fc|fc1|fc_in|lin1|w1|w3|Wi|dense_h_to_4h|intermediate\.dense"
    )
)
WRITES = re.compile(
    _LEAF.format(
        r"o_proj|out_proj|out_lin|Wo|down_proj|c_proj|fc2|fc_out|lin2|w2|dense_4h_to_h"
        r"|output\.dense|self_attn\.dense|attention\.dense|self_attention\.dense"
    )
)


def residual_side(name: str, p: int, q: int, width: int | None) -> ResidualSide:
    """Whether a layer W (p, q) reads the residual stream or writes to it.

    Args:
        name: dotted path of the layer, or of the first of a group.
        p, q: of the layer, or of the group's first.
        width: of the residual stream, where the configuration tells.

    Raises:
        ProtectionError: neither name nor shape tell.
    """
    if READS.search(name):
        return "reads"
    if WRITES.search(name):
        return "writes"
    if width is not None and (p == width) != (q == width):
        return "reads" if p == width else "writes"
    raise ProtectionError(
        f"{name} ({p} x {q}): neither its name nor its shape tells whether it reads the residual stream or writes to "
        "it, which sides='paper' goes by; add its name to enclave/sides.py, or use profile 'private'"
    )
