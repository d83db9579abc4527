"""Layers that are re-keyed while the run goes on: the truth follows, and attacks look at the newest secrets."""

from __future__ import annotations

from pathlib import Path

import torch

from obfuscatune.audit.attackers import parse_variants
from obfuscatune.audit.attacks.scoring import Truth
from obfuscatune.audit.record import record_run
from obfuscatune.audit.scenario import Scenario


def test_truth_follows_the_secrets(scenario: Scenario, tmp_path: Path) -> None:
    (variant,) = parse_variants("rotation:rekey_every=3")
    run = record_run(scenario, variant.profile, 0, tmp_path)
    truth: Truth = run.truth
    assert len(run.view.matrices) > run.view.layers
    assert any(call.epoch > 0 for call in truth.calls)
    for seen, true in zip(run.view.calls, truth.calls, strict=True):
        assert seen.layer == true.layer
        if not true.transposed:
            torch.testing.assert_close(seen.rows, truth.rotated(true), rtol=1e-4, atol=1e-4)
    newest = run.view.of_newest_matrix(0)
    assert len({call.matrix for call in newest}) == 1
    assert newest[-1] == run.view.forward(0)[-1]
