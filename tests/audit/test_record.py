"""A real worker's transcript and the truth beside it belong together, call by call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from obfuscatune.audit.attackers import equip, parse_variants
from obfuscatune.audit.attacks.base import Attacker, Finding, perform
from obfuscatune.audit.attacks.linkage import DecodingLinkage
from obfuscatune.audit.record import Recording, record_run
from obfuscatune.audit.scenario import Scenario, Size, make_scenario, read_text
from obfuscatune.errors import DataError
from tests.audit.conftest import SMALL


def record(scenario: Scenario, name: str, folder: Path) -> Recording:
    (variant,) = parse_variants(name)
    return record_run(scenario, variant.profile, 0, folder)


@pytest.fixture(scope="module")
def open_run(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(scenario, "identity", tmp_path_factory.mktemp("identity"))


def test_in_the_clear_both_sides_saw_the_same(open_run: Recording) -> None:
    seen, true = open_run.view.calls, open_run.truth.calls
    assert len(seen) == len(true)
    for a, b in zip(seen, true, strict=True):
        assert (a.layer, a.transposed) == (b.layer, b.transposed)
        torch.testing.assert_close(a.rows, b.rows, rtol=0, atol=0)
        assert len(b.tokens) == len(b.rows)
    for matrix, W in zip(open_run.view.matrices, open_run.truth.weights, strict=True):
        torch.testing.assert_close(matrix.W_star, W, rtol=1e-6, atol=1e-6)


def test_phases_are_told_apart(open_run: Recording) -> None:
    view, true = open_run.view, open_run.truth.calls
    for phase, calls in (
        ("training", view.training(0)),
        ("prompt", view.prompts(0)),
        ("decoding", view.decoding(0)),
    ):
        assert {true[call.index].phase for call in calls} == {phase}
    assert len(view.training(0)) == SMALL.examples * SMALL.epochs
    assert len(view.decoding(0)) == SMALL.prompts * (SMALL.new_tokens - 1)


def test_prompts_of_a_family_begin_alike(scenario: Scenario) -> None:
    a, b, c = scenario.prompts(0)
    assert a[:4] == b[:4] == c[:4]
    assert len({a, b, c}) == 3
    assert scenario.prompts(1) != scenario.prompts(0)


def test_the_secret_model_is_near_its_base_and_not_it(scenario: Scenario) -> None:
    assert 1e-4 < scenario.drift < 0.2
    assert not set(scenario.private) & set(scenario.public)


def test_nobody_is_given_what_is_not_theirs(scenario: Scenario, open_run: Recording) -> None:
    (variant,) = parse_variants("identity")
    closed = equip(Attacker.CLOSED, scenario, variant.profile, open_run.truth)
    assert closed.base is None and closed.text is None and closed.plaintext == ()
    public = equip(Attacker.PUBLIC_BASE, scenario, variant.profile, open_run.truth)
    assert public.base is not None and public.plaintext == ()
    assert closed.documents == ()
    trained = {call.tokens for call in open_run.truth.calls if call.phase == "training"}
    assert trained < set(public.documents) and list(public.documents) == sorted(public.documents)
    for W, base, secret in zip(public.base.weights, open_run.truth.bases, open_run.truth.weights, strict=True):
        assert torch.equal(W, base) and not torch.equal(W, secret)


def test_the_public_base_is_run_as_far_as_the_first_layer(scenario: Scenario, open_run: Recording) -> None:
    (variant,) = parse_variants("identity")
    base = equip(Attacker.PUBLIC_BASE, scenario, variant.profile, open_run.truth).base
    assert base is not None
    rows = base.first_rows(torch.tensor(scenario.public))
    torch.testing.assert_close(rows.flatten(0, 1), base.inputs, rtol=1e-5, atol=1e-5)


def test_lengths_follow_the_tokens_of_a_call() -> None:
    assert Size.with_tokens_per_call(Size().length) == Size()
    size = Size.with_tokens_per_call(128)
    assert (size.length, size.prompt, size.examples, size.prompts) == (128, 64, 12, 12)
    assert size.longest == 128 and Size.with_tokens_per_call(16).longest == 8 + size.new_tokens
    assert size.public * size.length <= Size().public * Size().length


def test_too_little_text_is_refused(scenario: Scenario, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least"):
        make_scenario("tiny", scenario.base, scenario.tokenizer, "a few words", tmp_path, SMALL)


def test_text_is_read_from_records_and_files(tmp_path: Path) -> None:
    records, plain = tmp_path / "a.jsonl", tmp_path / "a.txt"
    records.write_text(json.dumps({"prompt": "one", "completion": " two"}) + "\n")
    plain.write_text("three")
    assert read_text(records).split() == ["one", "two"]
    assert read_text(plain) == "three"
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path / "none.txt")


@pytest.mark.long
def test_without_the_first_block_in_the_enclave_every_equal_pair_is_found(stories260k: Path, tmp_path: Path) -> None:
    """docs/adr/0007, counted again on a real model, on other text: none missed, none false."""
    base = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    size = Size(length=16, examples=1, epochs=1, prompts=3, prompt=8, new_tokens=21, tuning_steps=2, public=20)
    scenario = make_scenario("stories", base, tokenizer, read_text(None), tmp_path / "secret", size)
    found = {}
    for name in ("private:first_blocks=0", "private"):
        run = record(scenario, name, tmp_path / name.replace(":", "-"))
        (variant,) = parse_variants(name)
        knowledge = equip(Attacker.CLOSED, scenario, variant.profile, run.truth)
        found[name] = perform(DecodingLinkage(), run.view, knowledge, run.truth, 0)
    exact, near = found["private:first_blocks=0"], found["private"]
    assert isinstance(exact, Finding) and isinstance(near, Finding)
    assert exact.details["alike"] >= 10
    assert exact.details["exact, true"] == exact.details["alike"]
    assert exact.details["exact, false"] == 0
    assert near.details["exact, true"] < near.details["alike"]
