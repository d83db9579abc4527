"""Both transcripts of a run under masks: each request finds its mask, and what is left is what `private` would send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from obfuscatune.assets import tiny_model_path
from obfuscatune.audit.attackers import equip, parse_variants
from obfuscatune.audit.attacks.base import Attack, Attacker, Finding, perform
from obfuscatune.audit.attacks.intersections import SharedRows
from obfuscatune.audit.attacks.linkage import DecodingLinkage
from obfuscatune.audit.attacks.one_time import MaskGaps, ReusedMasks
from obfuscatune.audit.attacks.view import SeenCall, SeenMatrix, WorkerView
from obfuscatune.audit.parties import Party, column, of_column, part_views
from obfuscatune.audit.record import Recording, record_run
from obfuscatune.audit.scenario import Scenario, Size, make_scenario, read_text
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.masks import DEVIATION, GRID, Mask, draw
from obfuscatune.errors import ProtectionError

SMALL = Size(length=16, examples=4, epochs=2, prompts=6, prompt=8, new_tokens=11, tuning_steps=2, public=20)


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    return make_scenario("tiny", base, tokenizer, read_text(None), tmp_path_factory.mktemp("secret"), SMALL)


@pytest.fixture(scope="module")
def laid_down() -> list[Tensor]:
    """X* of each request of `run`, before it was masked, in order."""
    return []


@pytest.fixture(scope="module")
def run(scenario: Scenario, laid_down: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Recording:
    hide = Mask.hide

    def note(mask: Mask, X_star: Tensor, out: Tensor) -> Tensor:
        laid_down.append(X_star.double())
        return hide(mask, X_star, out)

    (variant,) = parse_variants("guarded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mask, "hide", note)
        return record_run(scenario, variant.profile, 0, tmp_path_factory.mktemp("guarded"))


def test_both_together_have_exactly_what_was_laid_down(run: Recording, laid_down: list[Tensor]) -> None:
    both = run.views[Party.BOTH]
    assert len(both.calls) == len(laid_down) == len(run.truth.calls)
    for call, X_star in zip(both.calls, laid_down, strict=True):
        assert torch.equal(call.rows, GRID * (X_star / GRID).round())


def test_both_together_have_the_products(run: Recording) -> None:
    compute, masks, both = (run.views[party] for party in Party)
    calls = list(zip(compute.calls, masks.calls, both.calls, strict=True))
    for sent, mask, left in (*calls[:20], *calls[-20:]):
        apart = compute.products(sent) - masks.products(mask)
        torch.testing.assert_close(both.products(left), apart, rtol=0, atol=1e-4)  # 64 2^-53 L |W|, with room


def test_rows_and_products_of_each_alone_are_as_large_as_a_mask(run: Recording) -> None:
    for party in (Party.COMPUTE, Party.MASK):
        sizes = [call.rows.square().mean().sqrt() / DEVIATION for call in run.views[party].calls]
        assert min(sizes) > 0.8 and max(sizes) < 1.2


def test_each_mask_is_used_once_and_is_not_the_request(run: Recording) -> None:
    used = {mask.rows.numpy().tobytes() for mask in run.views[Party.MASK].calls}
    assert len(used) == len(run.truth.calls)


def test_the_account_is_of_the_rows_of_the_text(run: Recording) -> None:
    assert run.masks is not None
    assert run.masks.rows == sum(len(call.rows) for call in run.truth.calls)
    assert 0 < run.masks.advantage < run.masks.budget


@pytest.mark.parametrize("attack", [DecodingLinkage(), SharedRows(), MaskGaps()], ids=lambda attack: attack.name)
def test_what_links_tokens_needs_both(scenario: Scenario, run: Recording, attack: Attack) -> None:
    (variant,) = parse_variants("guarded")
    knowledge = equip(Attacker.CLOSED, scenario, variant.profile, run.truth)
    found = {party: perform(attack, view, knowledge, run.truth, 0) for party, view in run.views.items()}
    both = found[Party.BOTH]
    assert isinstance(both, Finding) and both.value > 0.9, both
    for party in (Party.COMPUTE, Party.MASK):
        alone = found[party]
        assert isinstance(alone, Finding)
        assert abs(alone.value - alone.chance) < 4 * alone.error, (party, alone)


Draw = Callable[..., Tensor]


def in_float32(*args: Any) -> Tensor:
    return draw(*args).float().double()


def each_twice() -> Draw:
    kept: dict[tuple[int, int], Tensor] = {}

    def again(stream: SecretStream, rows: int, width: int, deviation: float) -> Tensor:
        mask = kept.pop((rows, width), None)
        if mask is None:
            mask = draw(stream, rows, width, deviation)
            kept[rows, width] = mask.clone()
        return mask

    return again


@pytest.mark.long  # a run is recorded for each; attacks/test_masks.py has the same faults in made-up calls
@pytest.mark.parametrize(("attack", "fault"), [(MaskGaps(), in_float32), (ReusedMasks(), each_twice())])
def test_masks_with_a_fault_are_found_out(
    scenario: Scenario, attack: Attack, fault: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results stay right and every product is verified: nothing else would notice."""
    monkeypatch.setattr("obfuscatune.enclave.masks.draw", fault)
    (variant,) = parse_variants("guarded")
    run = record_run(scenario, variant.profile, 0, tmp_path)
    found = perform(attack, run.view, equip(Attacker.CLOSED, scenario, variant.profile, run.truth), run.truth, 0)
    assert isinstance(found, Finding) and found.advantage > 0.3 and found.value - found.chance > 5 * found.error, found


def test_without_masks_there_is_one_party(scenario: Scenario, tmp_path: Path) -> None:
    (variant,) = parse_variants("rotation")
    small = replace(scenario, size=replace(SMALL, examples=1, epochs=1, prompts=3, new_tokens=2))
    recording = record_run(small, variant.profile, 0, tmp_path)
    assert list(recording.views) == [Party.COMPUTE] and recording.masks is None


def test_columns_are_named_after_profile_and_party() -> None:
    names = [column("guarded:first_blocks=0", party) for party in Party]
    assert names == ["guarded:first_blocks=0", "guarded:first_blocks=0, mask worker", "guarded:first_blocks=0, both"]
    assert [of_column(name)[1] for name in names] == list(Party)


def view_of(matrices: list[Tensor], calls: list[tuple[int, Tensor]]) -> WorkerView:
    seen = tuple(SeenMatrix(W_star, layer) for layer, W_star in enumerate(matrices))
    made = (SeenCall(index, matrix, matrix, False, rows) for index, (matrix, rows) in enumerate(calls))
    return WorkerView(seen, tuple(made), len(matrices))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_masks_are_found_in_any_order_among_those_never_used() -> None:
    matrices = [normal(1, 5, 7), normal(2, 5, 7)]
    masks = [(call % 2, (normal(10 + call, 3, 5) * DEVIATION / GRID).round() * GRID) for call in range(60)]
    rows = [(normal(100 + call, 3, 5) / GRID).round() * GRID for call in range(20)]
    compute = view_of(matrices, [(masks[call][0], x + masks[call][1]) for call, x in enumerate(rows)])
    turned = [(1 - matrix, r) for matrix, r in reversed(masks)]
    views = part_views(compute, view_of(matrices[::-1], turned))
    for call, x in zip(views[Party.BOTH].calls, rows, strict=True):
        assert torch.equal(call.rows, x)
    assert [it.matrix for it in views[Party.MASK].calls] == [it.matrix for it in compute.calls]


def test_masks_that_were_drawn_together_are_found_one_by_one() -> None:
    W_star, r = normal(1, 5, 7), (normal(2, 12, 5) * DEVIATION / GRID).round() * GRID
    rows = [(normal(100 + call, count, 5) / GRID).round() * GRID for call, count in enumerate((3, 3, 3, 6))]
    starts = (9, 0, 3, 6)  # the last of them has rows of two masks, as one mask of another shape would
    requests = [(0, x + r[start : start + len(x)]) for start, x in zip(starts, rows, strict=True)]
    views = part_views(view_of([W_star], requests), view_of([W_star], [(0, normal(3, 6, 5) * DEVIATION), (0, r)]))
    for call, x in zip(views[Party.BOTH].calls, rows, strict=True):
        assert torch.equal(call.rows, x)


@pytest.mark.parametrize("change", ["another mask", "another matrix", "another number of rows", "a mask used twice"])
def test_a_request_without_its_mask_is_an_error(change: str) -> None:
    W_star, r, x = normal(1, 5, 7), normal(2, 3, 5) * DEVIATION, normal(3, 3, 5)
    calls, matrix, masks = [(0, x + r)], W_star, [(0, r)]
    match change:
        case "another mask":
            masks = [(0, normal(4, 3, 5) * DEVIATION)]
        case "another matrix":
            matrix = normal(5, 5, 7)
        case "another number of rows":
            masks = [(0, r[:2])]
        case "a mask used twice":
            calls = [(0, x + r), (0, 2 * x + r)]
    with pytest.raises(ProtectionError, match="is hidden under none"):
        part_views(view_of([W_star], calls), view_of([matrix], masks))
