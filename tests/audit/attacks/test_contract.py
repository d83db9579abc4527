"""Every attack says what it is, succeeds where it must, and does no better than luck where there is nothing to see."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from obfuscatune.audit.attacks.base import Attack, Attacker, Finding, NotRun, Target, perform
from obfuscatune.audit.attacks.knowledge import Knowledge, Scheme
from obfuscatune.audit.attacks.one_time import MaskGaps
from obfuscatune.audit.attacks.plaintext import KnownPlaintext
from obfuscatune.audit.attacks.registry import ATTACKS
from tests.audit.attacks import scenes

BY_NAME = {attack.name: attack for attack in ATTACKS}
SUCCEEDS_ON = {
    "equal-rows": (scenes.ROTATED, 0.99),
    "equal-tokens-decoding": (scenes.MIXED, 0.99),
    "moments-decoding": (scenes.MIXED, 0.9),
    "shared-rows": (scenes.MIXED, 0.99),
    "reused-masks": (scenes.REUSED, 0.5),
    "mask-gaps": (scenes.COARSE, 0.95),
    "frequency-decipherment": (scenes.ROTATED, 0.9),
    "source-separation": (scenes.UNROTATED, 0.5),
    "norm-matching": (scenes.ROTATED, 0.99),
    "vocabulary-matching": (scenes.EQUALLY_LONG, 0.9),
    "plain-outputs": (scenes.CLEAR, 0.99),
    "dictionary-membership": (scenes.MIXED, 0.9),
    "bag-of-tokens": (scenes.ROTATED, 0.9),
    "document-membership": (scenes.FILLED, 0.9),
    "label-inference": (scenes.ROTATED, 0.8),
    "adapter-inputs": (scenes.ADAPTED, 0.9),
    "adapter-labels": (scenes.ADAPTED, 0.7),
    "singular-values": (scenes.CLEAR, 0.99),
    "one-sided-procrustes": (scenes.ONE_SIDED, 0.5),
    "two-sided-alignment": (scenes.MIXED, 0.05),
    "arrowmatch": (scenes.PERMUTED, 0.9),
    "adapter-recovery": (scenes.ADAPTED, 0.8),
    "stealing-from-nothing": (scenes.CLEAR, 2.1),
    "stealing-from-base": (scenes.FAR, 2.1),
    "equal-beginnings": (scenes.MIXED, 0.9),
    "moments-prompts": (scenes.FILLED, 0.9),
    "equal-examples": (scenes.MIXED, 0.95),
    "moments-examples": (scenes.FILLED, 0.95),
    "basis-stitching": (scenes.ROTATED_IN_CONTEXT, 0.7),
    "grid-from-traffic": (scenes.UNLIKE, 0.55),
    "grid-from-base": (scenes.STRUCTURED, 0.8),
    "known-plaintext": (scenes.IN_CONTEXT, 0.95),
    "lengths-and-phases": (scenes.MIXED, 0.99),
    "timing": (scenes.MIXED, 0.9),
}
"""The scheme that each attack was made for, and the least value that is success there; of a loss, the largest."""
SEEDS = 3

every_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)


def attempt(attack: Attack, hiding: scenes.Hiding, seed: int = 0) -> Finding | NotRun:
    it = scenes.world(hiding, seed)
    return perform(attack, it.view, it.knowledge[attack.needs], it.truth, seed)


def found(attack: Attack, hiding: scenes.Hiding, seed: int = 0) -> Finding:
    result = attempt(attack, hiding, seed)
    assert isinstance(result, Finding), result
    return result


@cache
def control(name: str) -> Finding:
    """What an attack finds in the world that it was made for."""
    return found(BY_NAME[name], SUCCEEDS_ON[name][0])


def test_names_are_unique_and_each_has_its_control() -> None:
    assert len(BY_NAME) == len(ATTACKS)
    assert set(SUCCEEDS_ON) == set(BY_NAME)


@every_attack
def test_states_its_fields(attack: Attack) -> None:
    assert attack.name == attack.name.lower().replace(" ", "-")
    assert attack.needs in Attacker
    assert attack.target in Target
    assert len(attack.measure) > 10
    assert len(attack.source) >= 4
    assert attack.__doc__


@every_attack
def test_succeeds_on_what_it_was_made_for(attack: Attack) -> None:
    _, least = SUCCEEDS_ON[attack.name]
    finding = control(attack.name)
    better = 1 if finding.best > finding.chance else -1
    assert better * finding.value > better * least
    assert better * (finding.value - finding.chance) > 3 * finding.error


@every_attack
def test_is_no_better_than_chance_on_noise(attack: Attack) -> None:
    """Its chance level is right: over seeds, a worker that sees noise of the same shapes is where luck would be."""
    if attack.target is Target.SHAPES:
        pytest.skip("noise of the same shapes has the same shapes")
    results = [attempt(attack, scenes.NOISE, seed) for seed in range(SEEDS)]
    findings = [result for result in results if isinstance(result, Finding)]
    assert findings, results
    difference = sum(it.value - it.chance for it in findings) / len(findings)
    error = (sum(it.error**2 for it in findings) ** 0.5) / len(findings)
    assert abs(difference) < 4 * error + 0.02 * abs(findings[0].best - findings[0].chance)


def test_a_direction_without_a_mask_is_a_gap() -> None:
    assert found(MaskGaps(), scenes.NARROW).value > 0.9


def test_known_rows_that_fill_the_space_give_the_basis_away() -> None:
    assert found(KnownPlaintext(), scenes.LONG_IN_CONTEXT).value > 0.95


@every_attack
def test_one_time_masks_withstand(attack: Attack) -> None:
    """All but what W_star, which no mask hides, and shapes tell."""
    if attack.target in (Target.WEIGHTS, Target.SHAPES):
        pytest.skip("masks hide rows")
    result = attempt(attack, scenes.ONCE)
    if isinstance(result, NotRun):
        pytest.skip(f"could not be run: {result.why}")
    assert result.value - result.chance < 4 * result.error + 0.02


@every_attack
def test_without_its_knowledge_it_could_not_be_run(attack: Attack) -> None:
    if attack.needs is Attacker.CLOSED:
        pytest.skip("needs nothing")
    it = scenes.world(scenes.MIXED)
    nothing = Knowledge(Attacker.CLOSED, Scheme(mixing=True, shield_rows=4))
    assert isinstance(perform(attack, it.view, nothing, it.truth, 0), NotRun)


@every_attack
def test_a_run_depends_on_what_it_is_given_alone(attack: Attack) -> None:
    first, second = control(attack.name), found(attack, SUCCEEDS_ON[attack.name][0])
    assert first.value == pytest.approx(second.value)
    assert first.chance == pytest.approx(second.chance)


def test_advantage_is_a_share_of_the_way() -> None:
    finding = Finding(0.75, 0.5, 1.0, samples=4)
    assert finding.advantage == 0.5
    assert replace(finding, value=0.4).advantage == 0.0
    relative_error = Finding(0.25, 1.0, 0.0, samples=4)
    assert relative_error.advantage == 0.75
