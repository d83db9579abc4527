"""A device as the worker: what crosses its bus is recorded, and belongs to the truth call by call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from obfuscatune.audit.attackers import parse_variants
from obfuscatune.audit.parties import Party
from obfuscatune.audit.record import record_run
from obfuscatune.audit.scenario import Scenario
from obfuscatune.protocol.addresses import DeviceAddress


@pytest.mark.parametrize("name", ["rotation", "guarded"])
def test_what_crossed_the_bus(scenario: Scenario, tmp_path: Path, name: str) -> None:
    """Without mixing the rows are the rotated ones; under masks both parties are seen, and the masks' account is."""
    (variant,) = parse_variants(name)
    run = record_run(scenario, variant.profile, 0, tmp_path, DeviceAddress("cpu"))
    assert len(run.view.calls) == len(run.truth.calls) > 0
    if name == "guarded":
        assert run.views.keys() == {*Party}
        assert run.masks is not None
        assert run.masks.rows > 0
        return
    for seen, true in zip(run.view.calls, run.truth.calls, strict=True):
        assert (seen.layer, seen.transposed) == (true.layer, true.transposed)
        if not true.transposed:
            torch.testing.assert_close(seen.rows, run.truth.rotated(true), rtol=1e-4, atol=1e-4)
