"""`bench verify`: real workers where the clock is read."""

from __future__ import annotations

import json

import pytest
import torch

from obfuscatune.bench.verify import LINKS, TAMPERED, LotBench, VerifyBench, VerifyResult, _Request
from obfuscatune.bench.verify_masks import (
    CHANGED,
    COMPUTE,
    KINDS,
    MASK,
    PARTIES,
    MaskedBench,
    MaskedRequest,
    MaskedResult,
)


def test_each_kind_of_link_is_timed() -> None:
    said: list[str] = []
    rows = LotBench(requests=10, rows=(1,)).run(said.append)
    assert [row.link for row in rows] == list(LINKS)
    assert all(row.requests == 10 and row.checked_us > 0 < row.spared_us for row in rows)
    result = VerifyResult(VerifyBench(), {"float32": 0.5}, {"float32": 0}, [], MaskedResult([], []), rows, {})
    assert len(json.loads(json.dumps(result.as_json()))["which_is_checked"]) == len(said) == len(LINKS)
    assert "| tcp | 1 | 10 |" in result.as_markdown()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_honest_product_is_within_the_tolerance(dtype: torch.dtype) -> None:
    request = _Request(TAMPERED, dtype)
    assert 0 < request.excess(request.product) < 1
    assert request.stated(request.product + 1) > 0.99


def test_what_passes_under_masks_is_told_of_both_workers() -> None:
    """A change is caught from about the tolerance on: half of the changes of one row above 0.4 and below 3 of it."""
    result = MaskedBench(honest_calls=2, trials=40)
    passing = [row for kind in KINDS for row in result._passing(kind, lambda _: None)]
    assert {(row.party, row.kind) for row in passing} == {(party, kind) for party in PARTIES for kind in KINDS}
    for row in passing:
        assert 0.05 < row.half / row.tolerance < 3, row
        assert row.half <= row.nearly_all < 1e-2, row
        assert row.party in MaskedResult([], passing).as_markdown()


@pytest.mark.parametrize("party", PARTIES)
def test_an_honest_product_under_masks_is_within_the_tolerance(party: str) -> None:
    request = MaskedRequest(CHANGED)
    product = request.product(party)
    assert product.dtype == (torch.float64 if party in (COMPUTE, MASK) else torch.float32)
    assert 0 < request.excess(party)(product) < 1
    assert request.excess(party)(product + 1e-2 * request.row_norm) > 1


@pytest.mark.long
def test_no_worker_can_tell_from_time_which_product_will_be_checked() -> None:
    """Over 1,000 requests each: one row and many, shared memory and TCP; by the pause before the request comes."""
    for row in LotBench(requests=1_000).run(print):
        assert abs(row.area - 0.5) < 4 * row.error, row
