"""The cost model: work counted from a shape is the work that is done, and seconds are work over speed."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.advise.cost import (
    BY_ENCLAVE,
    BY_MASKS,
    BY_WORKERS,
    DOWN,
    LATENCY,
    MASKS,
    OWN,
    PRODUCTS,
    UP,
    Prediction,
    Speeds,
    Team,
    most_fed,
    predict,
    sharded,
)
from obfuscatune.advise.link import Link, RequestTimes
from obfuscatune.advise.work import Request, Work, count_work, flops_of
from obfuscatune.bench.measures import Product
from obfuscatune.bench.workload import config_of
from obfuscatune.enclave.profiles import resolve
from obfuscatune.errors import ConfigError

WORK = Work(
    "step", Counter(), Counter(), 100, 2e9, 1000,
    Counter({Request(64, 100, 300, 72): 3, Request(64, 300, 100, 72, transposed=True): 1}),
    64, 1000, 900, torch.float32, torch.float32,
)  # fmt: skip
SPEEDS = Speeds(1.0, 0.25, 0.5, 0.125, Link(1e-3, 2e-9, 3e-9), RequestTimes(1e-4, 5e-9, 4e-11, 1e-11))


def test_seconds_are_work_over_speed() -> None:
    found = predict(WORK, SPEEDS)
    up, down, elements = 4 * 72 * (3 * 100 + 300), 4 * 72 * (3 * 300 + 100), 4 * 72 * 100 * 300
    assert found.plain_seconds == pytest.approx(1 + 0.5 + 0.125)
    assert found.own_seconds == pytest.approx(0.25 + 0.5 + 0.125 + 4e-4 + 5e-9 * (up + down))
    waits = 4e-3 + 2e-9 * up + 3e-9 * down + 5e-11 * elements
    assert found.seconds == pytest.approx(found.own_seconds + waits)
    assert found.ratio == pytest.approx(found.seconds / found.plain_seconds)


def test_what_is_given_takes_the_place_of_what_was_measured() -> None:
    changed = SPEEDS.with_changes(worker_gflops=100, link_gbytes=0.5, latency_us=7)
    assert changed.requests.worker_gflops == pytest.approx(100)
    assert changed.requests.mask_seconds_an_element == pytest.approx(2e-11)
    assert changed.link == Link(7e-6, pytest.approx(2e-9), pytest.approx(2e-9))
    assert SPEEDS.with_changes() == SPEEDS
    unmasked = replace(SPEEDS, requests=replace(SPEEDS.requests, mask_seconds_an_element=0.0))
    assert unmasked.with_changes(worker_gflops=100).requests.mask_seconds_an_element == 0


def test_what_every_worker_is_sent_is_counted_for_each() -> None:
    """Rows of forward go to all, and their columns come from each; of a transposed matrix the other way round."""
    one = predict(WORK, SPEEDS)
    forward, back = 4 * 72 * 3 * 100, 4 * 72 * 300
    three = sharded([one] * 3)
    assert three.parts[UP] == pytest.approx(2e-9 * (3 * forward + back))
    assert three.parts[DOWN] == pytest.approx(3e-9 * (4 * 72 * 3 * 300 + 3 * 4 * 72 * 100))
    assert three.parts[PRODUCTS] == pytest.approx(one.parts[PRODUCTS] / 3)
    assert three.parts[LATENCY] == one.parts[LATENCY]


_SECONDS = st.floats(1e-6, 1e3)
_PREDICTIONS = st.lists(
    st.fixed_dictionaries(dict.fromkeys(predict(WORK, SPEEDS).parts, _SECONDS)).map(
        lambda parts: Prediction(1.0, parts, (0.75, 0.25))
    ),
    min_size=1,
    max_size=5,
)


@given(_PREDICTIONS)
def test_several_workers_share_the_columns_by_their_speed(several: list[Prediction]) -> None:
    many, fastest = sharded(several), min(it.parts[PRODUCTS] for it in several)
    assert many.own_seconds == pytest.approx(sum(it.own_seconds for it in several) / len(several))
    assert fastest / len(several) <= many.parts[PRODUCTS] * (1 + 1e-9) and many.parts[PRODUCTS] <= fastest * (1 + 1e-9)
    assert many.parts[LATENCY] == max(it.parts[LATENCY] for it in several)
    assert sharded(several[:1]).parts == pytest.approx(several[0].parts)


@given(_PREDICTIONS, st.integers(1, 64))
def test_streams_are_as_fast_as_the_workers_until_something_else_is_the_limit(
    several: list[Prediction], count: int
) -> None:
    team = Team.of(several, count)
    assert len(team.members) == count
    rate = sum(1 / it.worker_seconds for it in team.members)
    own, masks = (
        sum(it.own_seconds for it in team.members) / count,
        sum(it.parts[MASKS] for it in team.members) / count,
    )
    assert team.streamed_seconds == pytest.approx(max(1 / rate, own, masks))
    assert {BY_ENCLAVE: own, BY_WORKERS: 1 / rate, BY_MASKS: masks}[team.limit] == pytest.approx(team.streamed_seconds)


@given(st.integers(1, 4), _PREDICTIONS)
def test_no_more_workers_are_fed_than_are_of_use(copies: int, several: list[Prediction]) -> None:
    alike = several[:1] * copies
    fed = most_fed(alike)
    assert Team.of(alike, fed + 1).limit != BY_WORKERS or fed >= 1e9  # one more is of no use
    if fed > 1:
        assert Team.of(alike, fed - 1).limit == BY_WORKERS or fed == copies
    one = alike[0]
    assert (one.streams - 1) * one.own_seconds <= one.seconds * (1 + 1e-9)


def count(kind: str, shape: str, layers: int, profile: str = "private", rows: int = 64) -> Work:
    return count_work(kind, config_of(shape, layers), 1, rows, resolve(profile))  # type: ignore[arg-type]


def test_work_is_counted_from_the_shape() -> None:
    one, two = (count("step", "gpt2", layers) for layers in (2, 3))
    block, sent = 768 * (2304 + 768 + 3072 + 3072), 72
    assert two.crossings - one.crossings == 8  # four groups, forward and backward
    assert two.plain_flops - two.enclave_flops == 2 * (one.plain_flops - one.enclave_flops) == 2 * 4 * 64 * block
    assert one.worker_flops == 4 * sent * block
    assert one.bytes_up == one.bytes_down == 4 * sent * 768 * (1 + 3 + 1 + 1 + 1 + 4 + 4 + 1)
    assert one.other_bytes > 0 and one.others > 0 and one.trained > 0
    forward = count("forward", "gpt2", 2)
    assert forward.crossings == 4 and forward.trained == 0
    assert forward.other_bytes < one.other_bytes


def test_a_decoded_token_is_one_row_of_each_stream() -> None:
    work = count_work("decode", config_of("gpt2", 2), 8, 32, resolve("private"))
    assert work.crossings == 4 and work.tokens == 8
    assert {request.rows for request in work.requests} == {8}
    assert {product.rows for product in work.kept if product.inner == 768} == {8}


def test_masked_rows_are_of_float64_and_filled_up_to_a_bucket() -> None:
    private, guarded = (count("step", "gpt2", 2, profile, rows=100) for profile in ("private", "guarded"))
    assert guarded.wire_dtype == torch.float64
    (sent,), (filled,) = ({it.sent for it in work.requests} for work in (private, guarded))
    assert 100 + 8 <= sent < 128 + 8 <= filled  # with the shield rows
    assert guarded.crossing_bytes * sent == private.crossing_bytes * 2 * filled
    assert guarded.kept == private.kept


def test_experts_get_their_share_of_the_rows() -> None:
    work = count("step", "qwen3-moe", 2)
    stacks = {request: times for request, times in work.requests.items() if 1536 in (request.p, request.q)}
    assert set(stacks.values()) == {128}  # 64 rows go to 8 experts each: every one of 128 gets 4
    assert {request.rows for request in stacks} == {4}
    assert work.other_bytes > 0
    assert flops_of(work.kept) < flops_of(work.products)
    assert Product(4, 2048, 1536) in work.kept  # of the first block


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        ("gpt2", [(768, 2304), (768, 768), (768, 3072), (3072, 768)]),
        ("qwen3-moe", [(2048, 4096), (2048, 512), (2048, 512), (4096, 2048)]),  # experts have no factors
    ],
)
def test_factors_are_trained_on_what_the_benchmarks_train_them_on(shape: str, layers: list[tuple[int, int]]) -> None:
    assert count("step", shape, 2).trained == 2 * 16 * sum(p + q for p, q in layers)


@pytest.mark.parametrize(("kind", "profile"), [("step", "paper"), ("train", "private")])
def test_what_is_not_covered_is_refused(kind: str, profile: str) -> None:
    with pytest.raises(ConfigError, match="LoRA in the enclave" if profile == "paper" else "expected step, forward"):
        count(kind, "gpt2", 2, profile)


def test_every_part_is_the_enclaves_or_the_workers() -> None:
    assert set(OWN) < set(predict(WORK, SPEEDS).parts)
