"""Settings, limits, sealed run directories, uploads, receipts, terms: each part alone."""

from __future__ import annotations

import asyncio
import datetime
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from obfuscatune.attest.claims import Claims, Software
from obfuscatune.attest.policy import Policy
from obfuscatune.attest.simulated import Simulated
from obfuscatune.channel.grants import Grant, Terms
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.registry import GrantRegistry
from obfuscatune.errors import IntegrityError, StorageError, TermsError, VerificationFailed
from obfuscatune.secret_memory import SecretBytes
from obfuscatune.service.access import INFERENCE, Access
from obfuscatune.service.api.errors import ApiError
from obfuscatune.service.api.multipart import read_upload
from obfuscatune.service.api.requests import ChatBody, CompletionBody
from obfuscatune.service.handler import adapter_id
from obfuscatune.service.job_results import results_csv
from obfuscatune.service.keys import Owner, job_key
from obfuscatune.service.limits import Busy, RateLimits
from obfuscatune.service.receipt import Attestation, about_job, make_receipt, verify_receipt
from obfuscatune.service.sealed_files import SealedDirectory
from obfuscatune.service.settings import Limits
from obfuscatune.service.state import State


def test_rates_are_bounded_for_each_owner() -> None:
    now = [0.0]
    rates = RateLimits(Limits(requests_per_minute=2, tokens_per_minute=60, concurrent_requests=1), clock=lambda: now[0])
    rates.request("a")
    rates.request("a")
    with pytest.raises(Busy) as caught:
        rates.request("a")
    assert caught.value.retry_after_s == pytest.approx(30)
    rates.request("b")
    now[0] = 30.0
    rates.request("a")
    with rates.completion("a", 50), pytest.raises(Busy, match="at a time"), rates.completion("a", 1):
        pass
    with pytest.raises(Busy, match="tokens a minute"), rates.completion("a", 50):
        pass
    now[0] = 90.0
    with rates.completion("a", 1000):  # more than the bucket holds is taken when it is full
        pass


def test_a_sealed_directory_gives_back_what_was_written(tmp_path: Path) -> None:
    key = SecretBytes(os.urandom(32))
    placed: list[str] = []
    made = SealedDirectory(tmp_path / "run", key, "job", placed.append)
    made.write_file("a", b"canary one")
    made.append("a", b" and two")
    made.append("b", b"three")
    made.write_directory("d", {"x": b"canary four"})
    again = SealedDirectory(tmp_path / "run", key, "job")
    again.append("a", b" and five")
    assert [again.read(it) for it in ("a", "b", "d/x")] == [b"canary one and two and five", b"three", b"canary four"]
    assert placed == ["d"]
    assert b"canary" not in b"".join(it.read_bytes() for it in tmp_path.rglob("*") if it.is_file())
    for other in (SealedDirectory(tmp_path / "run", key, "other"), SealedDirectory(tmp_path / "run", _key(), "job")):
        with pytest.raises(StorageError):
            other.read("a")
    (tmp_path / "run" / "d" / "x").replace(tmp_path / "run" / "y")
    with pytest.raises(StorageError):
        again.read("y")


def test_a_torn_addition_is_left_out(tmp_path: Path) -> None:
    key = _key()
    made = SealedDirectory(tmp_path, key, "job")
    made.write_file("a", b"one")
    made.append("a", b" two")
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[:-1])
    again = SealedDirectory(tmp_path, key, "job")
    assert again.read("a") == b"one"
    again.append("a", b" three")
    assert again.read("a") == b"one three"
    (tmp_path / "a").write_bytes(whole[:20])
    with pytest.raises(StorageError, match="cut off"):
        again.read("a")


def test_a_job_s_key_takes_both(tmp_path: Path) -> None:
    one, two, model = Owner("a", b"", _key()), Owner("b", b"", _key()), _key()
    assert job_key(one, model, "j") == job_key(one, model, "j")
    for other in (job_key(two, model, "j"), job_key(one, _key(), "j"), job_key(one, model, "k")):
        assert other != job_key(one, model, "j")
    with pytest.raises(IntegrityError):
        Owner("a", b"", SecretBytes(b"short"))


def _key() -> SecretBytes:
    return SecretBytes(os.urandom(32))


BOUNDARY = "b0undary"


def form(*parts: tuple[str, bytes]) -> bytes:
    made = b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (BOUNDARY.encode(), head.encode(), body) for head, body in parts)
    return made + b"--%s--\r\n" % BOUNDARY.encode()


def upload(content: bytes, most: int = 1000, sizes: tuple[int, ...] = (7,)) -> Any:
    async def chunks() -> AsyncIterator[bytes]:
        at, turn = 0, 0
        while at < len(content):
            size = sizes[turn % len(sizes)]
            yield content[at : at + size]
            at, turn = at + size, turn + 1

    return asyncio.run(read_upload(f"multipart/form-data; boundary={BOUNDARY}", chunks(), most_bytes=most))


FILE = 'Content-Disposition: form-data; name="file"; filename="t.jsonl"'


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_an_upload_comes_as_it_was_sent(content: bytes, sizes: list[int]) -> None:
    body = form(('Content-Disposition: form-data; name="purpose"', b"fine-tune"), (FILE, content))
    if BOUNDARY.encode() in content:
        return
    found = upload(body, sizes=tuple(sizes))
    assert (found.fields, found.filename, found.content()) == ({"purpose": "fine-tune"}, "t.jsonl", content)
    found.close()


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_characters='"\\\r\n', exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_a_file_may_have_any_name(name: str) -> None:
    found = upload(form((f'Content-Disposition: form-data; name="file"; filename="{name}"', b"x")))
    found.close()
    assert isinstance(found.filename, str)
    if name.isalnum():
        assert found.filename == name


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_whatever_is_no_upload_is_refused(content: bytes) -> None:
    with pytest.raises(ApiError):
        upload(content)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (form((FILE, b"x" * 1001)), 413),
        (form((FILE, b"x"), (FILE, b"y")), 400),
        (form(("Content-Type: text/plain", b"x")), 400),
        (form(*[(f'Content-Disposition: form-data; name="f{n}"', b"") for n in range(17)]), 400),
        (form(('Content-Disposition: form-data; name="purpose"', b"x" * 5000)), 400),
        (form((FILE + "\r\nX: " + "y" * 5000, b"x")), 400),
        (form((FILE, b"x"))[:-8], 400),
    ],
)
def test_uploads_are_bounded(body: bytes, status: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ApiError) as caught:
        upload(body)
    assert caught.value.status == status
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "change",
    [
        {"nonsense": 1},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"top_p": -0.1},
        {"n": 0},
        {"max_tokens": 0},
        {"stop": ["a"] * 5},
        {"stream_options": {"include_usage": True}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": 101}},
        {"seed": 2**64},
        {"model": "a\nb"},
        {"best_of": 3},
        {"prompt": []},
        {"prompt": [-1]},
        {"suffix": "x"},
    ],
)
def test_bodies_are_strict(change: dict[str, Any]) -> None:
    body = {"model": "m", "prompt": "p"}
    CompletionBody.model_validate(body)
    with pytest.raises(ValidationError):
        CompletionBody.model_validate({**body, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"tools": [{}]},
        {"top_logprobs": 3},
        {"max_tokens": 1, "max_completion_tokens": 1},
        {"response_format": {"type": "json_object"}},
        {"store": True},
    ],
)
def test_chats_are_strict(change: dict[str, Any]) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    ChatBody.model_validate(body)
    with pytest.raises(ValidationError):
        ChatBody.model_validate({**body, **change})


def test_tokens_are_taken_before_they_are_used(tmp_path: Path) -> None:
    state = State(f"sqlite:///{tmp_path / 's.sqlite'}")
    registry, provider, owner = GrantRegistry(), Identity.generate("p"), "a" * 64
    terms = Terms((owner,), ("inference",), "never", datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC), 100)
    signed = Grant("m", "b" * 64, "/x", terms, 1).sign(provider)
    registry.grant(Grant.from_signed(signed, provider.fingerprint), datetime.datetime.now(datetime.UTC))
    access = Access(registry, state)
    first = access.reserve("m", owner, INFERENCE, 60)
    with pytest.raises(TermsError, match="tokens"):
        access.reserve("m", owner, INFERENCE, 41)
    access.settle(first, 10)
    again = Access(registry, State(f"sqlite:///{tmp_path / 's.sqlite'}"))  # after a restart
    again.reserve("m", owner, INFERENCE, 90)
    for use, model, who in (("fine-tuning", "m", owner), (INFERENCE, "n", owner), (INFERENCE, "m", "c" * 64)):
        with pytest.raises(TermsError):
            access.reserve(model, who, use, 1)
    state.close()


KEY, PLATFORM = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def receipt() -> dict[str, Any]:
    claims = Claims(
        software=Software("obfuscatune", "1", "0" * 64),
        configuration="1" * 64,
        http_key="2" * 64,
        hpke_key="3" * 64,
        signing_key=public(KEY),
        boot="4" * 64,
    )
    about = about_job(
        job="ftjob-1",
        owner="5" * 64,
        model={"name": "m", "manifest": "6" * 64},
        data={"training": "7" * 64, "validation": None},
        recipe={"lr": 0.1, "n_epochs": 3},
        adapter={"adapter_model.safetensors": "8" * 64},
        products={"requests": 5, "verified": 5},
        masks={"advantage": 1e-9},
        losses="9" * 64,
        steps=3,
        tokens=100,
        began=1,
    )
    return make_receipt(about, Attestation.make(claims, Simulated(PLATFORM)), KEY)


POLICY = {
    "version": 1,
    "require": [["simulated"]],
    "allow_simulated": True,
    "simulated": {"keys": [public(PLATFORM)]},
    "claims": {"configuration": ["1" * 64]},
}


def test_a_receipt_verifies_by_key_and_by_policy() -> None:
    signed = receipt()
    assert verify_receipt(signed, key=public(KEY), now=0).verified is None
    found = verify_receipt(signed, policy=Policy.from_document(POLICY), now=0)
    assert found.verified is not None
    assert found.document["recipe"]["lr"] == "0.1"


def changed(signed: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**signed, "document": {**signed["document"], **fields}}


def test_a_receipt_that_was_changed_is_refused() -> None:
    signed = receipt()
    for name in signed["document"]:
        if name in ("claims", "evidence"):
            continue
        with pytest.raises(IntegrityError):
            verify_receipt(changed(signed, **{name: "x"}), key=public(KEY), now=0)
    with pytest.raises(IntegrityError):
        verify_receipt(signed, key=public(PLATFORM), now=0)
    with pytest.raises(IntegrityError, match="by a key"):
        verify_receipt(signed, now=0)
    with pytest.raises(VerificationFailed):
        verify_receipt(signed, policy=Policy.from_document({**POLICY, "claims": {"configuration": ["f" * 64]}}), now=0)


def test_evidence_of_another_service_is_no_receipt_s() -> None:
    signed = receipt()
    thief = Ed25519PrivateKey.generate()
    document = signed["document"]
    claims = Claims.from_document({**document["claims"], "signing_key": public(thief)})
    stolen = Attestation(claims, _evidence(document), bytes.fromhex(document["nonce"]), bytes.fromhex("2" * 64))
    about = {name: document[name] for name in document if name not in ("claims", "evidence", "nonce", "attester")}
    forged = make_receipt(about, stolen, thief)
    assert verify_receipt(forged, key=public(thief), now=0).verified is None
    with pytest.raises(VerificationFailed, match="report_data"):
        verify_receipt(forged, policy=Policy.from_document(POLICY), now=0)


def _evidence(document: dict[str, Any]) -> Any:
    from obfuscatune.attest.evidence import Evidence

    return Evidence.from_document(document["evidence"])


def test_an_adapter_is_named_without_its_owner_s_words() -> None:
    assert adapter_id("ft:tiny:0011aabb:secret-project:" + "ab" * 12) == "ab" * 12
    for other in ("ft:tiny:0011aabb:secret:project", "secret", "ft:a:b:c:" + "AB" * 12):
        assert len(adapter_id(other)) == 64


def test_metrics_become_openai_s_file() -> None:
    lines = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2}\n{"step": 2, "eval_loss": 1.5}\n'
    assert results_csv(lines).decode().splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,2.500000,,,",
        "2,2.000000,,1.500000,",
    ]
