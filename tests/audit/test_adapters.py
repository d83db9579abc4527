"""A run with its adapter on the worker: what the worker sees of it, and that it can train it again from that."""

from __future__ import annotations

import pytest
import torch

from obfuscatune.audit import record
from obfuscatune.audit.attackers import equip, parse_variants
from obfuscatune.audit.attacks.adapters import AdapterRecovery
from obfuscatune.audit.attacks.base import Attacker, Finding, perform
from obfuscatune.audit.attacks.replay import replay
from obfuscatune.audit.scenario import Scenario
from tests.audit.conftest import SMALL


@pytest.fixture(scope="module")
def run(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> record.Recording:
    """Without dropout, whose draws no transcript has."""
    (variant,) = parse_variants("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "LORA_DROPOUT", 0.0)
        return record.record_run(scenario, variant.profile, 0, tmp_path_factory.mktemp("paper"))


def test_rows_for_an_adapter_are_calls_of_its_layer(run: record.Recording) -> None:
    assert len(run.view.calls) == len(run.truth.calls)
    for seen, true in zip(run.view.calls, run.truth.calls, strict=True):
        assert (seen.layer, seen.transposed) == (true.layer, true.transposed)
        if not true.transposed:
            torch.testing.assert_close(seen.rows, run.truth.rotated(true), rtol=1e-5, atol=1e-5)
    assert len(run.view.training(0)) == SMALL.examples * SMALL.epochs
    assert len(run.view.decoding(0)) == SMALL.prompts * (SMALL.new_tokens - 1)
    assert len(run.view.backward(0)) == SMALL.examples * SMALL.epochs


def test_the_worker_waited_for_every_call(run: record.Recording) -> None:
    assert all(call.awaited_ns > 0 for call in run.view.calls)


@pytest.mark.parametrize("layer", [0, 3])
def test_training_again_leads_to_what_was_fetched(run: record.Recording, layer: int) -> None:
    again = replay(run.view, layer)
    assert [len(step.calls) for step in again.steps] == [1] * (SMALL.examples * SMALL.epochs)
    (adapter,) = (it for it in run.view.adapters if it.layer == layer)
    for key, factor in again.factors.items():
        moved = (adapter.fetched[key] - adapter.put[key]).abs().max()
        torch.testing.assert_close(factor, adapter.fetched[key], rtol=0, atol=float(0.02 * moved))


def test_what_an_adapter_adds_is_scored_against_the_plain_one(scenario: Scenario, run: record.Recording) -> None:
    (variant,) = parse_variants("paper")
    knowledge = equip(Attacker.PUBLIC_BASE, scenario, variant.profile, run.truth)
    found = perform(AdapterRecovery(), run.view, knowledge, run.truth, 0)
    assert isinstance(found, Finding)
    assert found.value > 0.9
    for adapter, R_in, true in zip(run.view.adapters, _bases(run), run.truth.adapters, strict=True):
        change = adapter.delta(true.shape[1])
        assert change is not None
        back = R_in[0] @ change @ R_in[1].T
        torch.testing.assert_close(back, true, rtol=0, atol=float(1e-3 * true.abs().max()))


def _bases(run: record.Recording) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.R_in[-1], layer.R_out[-1]) for layer in run.truth.layers]
