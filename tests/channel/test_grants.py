"""Grants, consents, revocations: each term, each signature, their order."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune import documents
from obfuscatune.channel.grants import (
    EXPORTS,
    MOST_OWNERS,
    MOST_TOKENS,
    USES,
    Consent,
    Grant,
    Revocation,
    Terms,
    next_sequence,
    read_time,
)
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.registry import MOST_ASKED, MOST_MODELS, GrantRegistry, Latest
from obfuscatune.errors import IntegrityError, TermsError
from tests.channel.parties import DIGEST, NOW, UNTIL, grant, terms

PROVIDER, OTHER = Identity.generate("provider"), Identity.generate("another provider")
OWNER = "01" * 32
SECOND = datetime.timedelta(seconds=1)


def signed(what: Grant | Revocation | Consent, identity: Identity = PROVIDER) -> Any:
    return type(what).from_signed(what.sign(identity), identity.fingerprint)


def registry(**changed: Any) -> GrantRegistry:
    made = GrantRegistry()
    made.grant(signed(grant(1, owners=(OWNER,), **changed)), NOW)
    return made


moments = st.datetimes(datetime.datetime(1000, 1, 1), datetime.datetime(9999, 12, 31)).map(
    lambda it: it.replace(microsecond=0, tzinfo=datetime.UTC)
)
some_terms = st.builds(
    Terms,
    st.lists(st.binary(min_size=32, max_size=32).map(bytes.hex), min_size=1, max_size=4, unique=True).map(tuple),
    st.lists(st.sampled_from(USES), min_size=1, unique=True).map(tuple),
    st.sampled_from(EXPORTS),
    moments,
    st.none() | st.integers(1, MOST_TOKENS),
)
some_grants = st.builds(
    Grant,
    st.text("aZ09._-", max_size=63).map(lambda it: f"m{it}"),
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=100),
    some_terms,
    st.integers(0, MOST_TOKENS),
)


@settings(max_examples=50, deadline=None)
@given(some_grants)
def test_a_grant_comes_back_as_it_was_signed(granted: Grant) -> None:
    back = signed(granted)
    assert back.provider == PROVIDER.key.public_key().public_bytes_raw().hex()
    assert (back.model, back.manifest, back.storage, back.terms, back.sequence, back.id) == (
        granted.model,
        granted.manifest,
        granted.storage,
        granted.terms,
        granted.sequence,
        granted.id,
    )


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["version", "id", "model", "manifest", "storage", "terms", "sequence"]), json)
def test_a_field_of_any_other_value_is_refused_or_kept(name: str, value: Any) -> None:
    document = grant().sign(PROVIDER)["document"]
    resigned = PROVIDER.sign({**document, name: value}, "grant")
    try:
        back = Grant.from_signed(resigned, PROVIDER.fingerprint)
    except IntegrityError:
        return
    assert back.sign(PROVIDER)["document"] == {**document, name: value}


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["owners", "uses", "export", "until", "tokens"]), json)
def test_a_term_of_any_other_value_is_refused_or_kept(name: str, value: Any) -> None:
    document = {**terms().to_document(), name: value}
    try:
        back = Terms.from_document(document)
    except IntegrityError:
        return
    assert back.to_document() == document


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"owners": []}, "owners"),
        ({"owners": [DIGEST.upper()]}, "owners"),
        ({"owners": [OWNER, OWNER]}, "each one once"),
        ({"owners": [f"{n:064x}" for n in range(MOST_OWNERS + 1)]}, "owners"),
        ({"uses": []}, "uses"),
        ({"uses": ["inference", "training"]}, "uses"),
        ({"uses": ["inference", "inference"]}, "each one once"),
        ({"export": "Never"}, "export"),
        ({"until": "2030-01-01T00:00:00+00:00"}, "until"),
        ({"until": "2030-02-30T00:00:00Z"}, "until"),
        ({"until": "２０30-01-01T00:00:00Z"}, "until"),
        ({"until": 1893456000}, "until"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": True}, "tokens"),
        ({"tokens": MOST_TOKENS + 1}, "tokens"),
        ({"more": 1}, "no other"),
    ],
)
def test_terms_outside_their_range(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(IntegrityError, match=text):
        Terms.from_document({**terms().to_document(), **changed})


@pytest.mark.parametrize("what", [grant(), Revocation("llama", DIGEST, 2), Consent("llama", DIGEST, DIGEST, "a")])
def test_only_its_sender_signs_it_and_for_this_alone(what: Grant | Revocation | Consent) -> None:
    kind = type(what)
    document = what.sign(PROVIDER)
    assert kind.from_signed(document, PROVIDER.fingerprint)
    with pytest.raises(IntegrityError, match="signed by the key"):
        kind.from_signed(document, OTHER.fingerprint)
    for purpose in ("grant", "revocation", "consent", "receipt"):
        if purpose != kind.PURPOSE:
            with pytest.raises(IntegrityError, match="not for"):
                kind.from_signed(PROVIDER.sign(document["document"], purpose), PROVIDER.fingerprint)
    for key in (None, 7, "", "zz" * 32, "00" * 31, OTHER.key.public_key().public_bytes_raw().hex()):
        with pytest.raises(IntegrityError):
            kind.from_signed({**document, "key": key}, PROVIDER.fingerprint)
    with pytest.raises(IntegrityError, match="another version"):
        kind.from_signed(PROVIDER.sign({**document["document"], "version": 2}, kind.PURPOSE), PROVIDER.fingerprint)
    with pytest.raises(IntegrityError, match="no other"):
        kind.from_signed(PROVIDER.sign({**document["document"], "also": 1}, kind.PURPOSE), PROVIDER.fingerprint)


@pytest.mark.parametrize(
    ("owner", "use", "now", "used", "wanted", "term"),
    [
        (OWNER, "inference", NOW, 0, 1, None),
        (OWNER, "inference", UNTIL - SECOND, 999, 1, None),
        (DIGEST, "inference", NOW, 0, 1, "owners"),
        (OWNER, "fine-tuning", NOW, 0, 1, "uses"),
        (OWNER, "inference", UNTIL, 0, 1, "until"),
        (OWNER, "inference", NOW, 1000, 1, "tokens"),
        (OWNER, "inference", NOW, 0, 1001, "tokens"),
    ],
)
def test_each_term(owner: str, use: str, now: datetime.datetime, used: int, wanted: int, term: str | None) -> None:
    granted = registry(uses=("inference",))
    if term is None:
        assert granted.check("llama", owner, use, now, used, wanted).model == "llama"
    else:
        with pytest.raises(TermsError, match=f"^{term}: "):
            granted.check("llama", owner, use, now, used, wanted)


def test_no_limit_of_tokens() -> None:
    registry(tokens=None).check("llama", OWNER, "inference", NOW, 10**18, 10**18)


def test_what_is_not_granted() -> None:
    with pytest.raises(TermsError, match=r"^model: nothing is granted for 'gpt'"):
        registry().check("gpt", OWNER, "inference", NOW, 0)
    with pytest.raises(TermsError, match="over already"):
        GrantRegistry().grant(signed(grant()), UNTIL)


def test_older_grants_do_not_come_back() -> None:
    granted = registry()
    granted.grant(signed(grant(3, owners=(OWNER,))), NOW)
    for sequence in (1, 2):
        with pytest.raises(TermsError, match=r"^sequence: "):
            granted.grant(signed(grant(sequence, owners=(OWNER,), export="allowed")), NOW)
    with pytest.raises(TermsError, match=r"^sequence: 3 was another document's"):
        granted.grant(signed(grant(3, owners=(OWNER,), export="allowed")), NOW)
    assert granted.check("llama", OWNER, "inference", NOW, 0).terms.export == "never"


def test_nor_after_a_restart() -> None:
    newest = signed(grant(3, owners=(OWNER,)))
    granted = registry()
    granted.grant(newest, NOW)
    assert granted.latest == {(newest.provider, "llama"): Latest(3, documents.digest(newest.signed))}
    restarted = GrantRegistry(granted.latest)
    with pytest.raises(TermsError, match="nothing is granted"):
        restarted.check("llama", OWNER, "inference", NOW, 0)
    with pytest.raises(TermsError, match=r"^sequence: 1 is older than 3"):
        restarted.grant(signed(grant(1)), NOW)
    with pytest.raises(TermsError, match=r"^sequence: 3 was another"):
        restarted.grant(signed(grant(3, owners=(OWNER,))), NOW)  # of another id
    restarted.grant(newest, NOW)


def test_a_revocation_ends_it_for_good() -> None:
    granted = registry(export="provider-consent")
    granted.consent(signed(Consent("llama", DIGEST, OWNER, "ft:1")))
    with pytest.raises(TermsError, match=r"^sequence: "):
        granted.revoke(signed(Revocation("llama", DIGEST, 0)))
    taken = granted.revoke(signed(Revocation("llama", DIGEST, 5)))
    assert taken is not None and taken.sequence == 1 and granted.grants == ()
    with pytest.raises(TermsError, match="nothing is granted"):
        granted.check("llama", OWNER, "inference", NOW, 0)
    with pytest.raises(TermsError, match=r"^sequence: "):
        granted.grant(signed(grant(4)), NOW)
    with pytest.raises(TermsError, match=r"^sequence: "):
        GrantRegistry(granted.latest).grant(signed(grant(4)), NOW)
    granted.grant(signed(grant(6, owners=(OWNER,), export="provider-consent")), NOW)
    with pytest.raises(TermsError, match="has not consented"):
        granted.check_export("llama", OWNER, "ft:1", NOW)


def test_another_provider_takes_no_name_and_revokes_nothing() -> None:
    granted = registry(export="provider-consent")
    for act in (
        lambda: granted.grant(signed(grant(9), OTHER), NOW),
        lambda: granted.revoke(signed(Revocation("llama", DIGEST, 9), OTHER)),
        lambda: granted.consent(signed(Consent("llama", DIGEST, OWNER, "ft:1"), OTHER)),
    ):
        with pytest.raises(TermsError, match="another provider"):
            act()
    with pytest.raises(TermsError, match="nothing was granted"):
        granted.revoke(signed(Revocation("gpt", DIGEST, 9), OTHER))
    assert len(granted.latest) == 1, "who has granted nothing takes no memory"


@pytest.mark.parametrize(
    ("export", "consented", "text"),
    [
        ("allowed", False, None),
        ("never", False, "lets no adapter leave"),
        ("provider-consent", False, "has not consented to ft:1"),
        ("provider-consent", True, None),
    ],
)
def test_export(export: str, consented: bool, text: str | None) -> None:
    granted = registry(export=export)
    if consented:
        granted.consent(signed(Consent("llama", DIGEST, OWNER, "ft:1")))
        for owner, adapter in ((OWNER, "ft:2"), (DIGEST, "ft:1")):
            with pytest.raises(TermsError):
                granted.check_export("llama", owner, adapter, NOW)
        with pytest.raises(TermsError, match=r"^until: "):
            granted.check_export("llama", OWNER, "ft:1", UNTIL)
    if text is None:
        assert granted.check_export("llama", OWNER, "ft:1", NOW)
    else:
        with pytest.raises(TermsError, match=text):
            granted.check_export("llama", OWNER, "ft:1", NOW)


def test_consents_that_are_for_nothing() -> None:
    for export, consent, text in (
        ("never", Consent("llama", DIGEST, OWNER, "a"), "asks for no consent"),
        ("provider-consent", Consent("llama", "cd" * 32, OWNER, "a"), "another bundle"),
        ("provider-consent", Consent("llama", DIGEST, "cd" * 32, "a"), "does not name the owner"),
        ("provider-consent", Consent("gpt", DIGEST, OWNER, "a"), "nothing is granted"),
    ):
        with pytest.raises(TermsError, match=text):
            registry(export=export).consent(signed(consent))


def test_a_grant_of_another_bundle_ends_consents_and_one_of_the_same_does_not() -> None:
    granted = registry(export="provider-consent")
    granted.consent(signed(Consent("llama", DIGEST, OWNER, "ft:1")))
    granted.grant(signed(grant(2, owners=(OWNER,), export="provider-consent")), NOW)
    assert granted.check_export("llama", OWNER, "ft:1", NOW)
    granted.grant(signed(grant(3, manifest="cd" * 32, owners=(OWNER,), export="provider-consent")), NOW)
    with pytest.raises(TermsError, match="has not consented"):
        granted.check_export("llama", OWNER, "ft:1", NOW)


def test_a_grant_that_is_forgotten() -> None:
    granted, newer = registry(), signed(grant(2, owners=(OWNER,)))
    older = granted.grants[0]
    granted.grant(newer, NOW)
    granted.forget(older)
    assert granted.grants == (newer,)
    granted.forget(newer)
    assert granted.grants == () and granted.latest[newer.provider, "llama"].sequence == 2


def test_models_are_bounded() -> None:
    full = GrantRegistry({("00", f"model-{number}"): Latest(1, "") for number in range(MOST_MODELS)})
    with pytest.raises(TermsError, match="1,024 models"):
        full.grant(signed(grant()), NOW)


def test_times_and_sequences() -> None:
    assert read_time("2027-01-01") == NOW == read_time("2027-01-01T00:00:00Z")
    for text in ("2027", "01.01.2027", "2027-13-01", "2027-01-01T00:00:00", "2027-01-01T00:00:00+01:00", ""):
        with pytest.raises(IntegrityError, match="2027-01-01T12:00:00Z"):
            read_time(text)
    assert 1_700_000_000_000 < next_sequence() < MOST_TOKENS


def test_consents_that_are_asked_for_wait_until_they_are_given() -> None:
    granted = registry(export="provider-consent")
    assert granted.ask_consent("llama", OWNER, "ft:1") and granted.ask_consent("llama", OWNER, "ft:2")
    assert granted.ask_consent("llama", OWNER, "ft:1")  # once more is once
    assert granted.asked("llama") == [{"owner": OWNER, "adapter": "ft:1"}, {"owner": OWNER, "adapter": "ft:2"}]
    granted.consent(signed(Consent("llama", DIGEST, OWNER, "ft:1")))
    assert granted.asked("llama") == [{"owner": OWNER, "adapter": "ft:2"}]
    assert granted.consents_to("llama", OWNER) == ["ft:1"] and not granted.consents_to("llama", DIGEST)
    assert not granted.ask_consent("llama", OWNER, "ft:1")
    for number in range(2 * MOST_ASKED):
        granted.ask_consent("llama", OWNER, f"many:{number}")
    assert [it["adapter"] for it in granted.asked("llama")][-1] == f"many:{2 * MOST_ASKED - 1}"
    assert len(granted.asked("llama")) == MOST_ASKED
    granted.revoke(signed(Revocation("llama", DIGEST, 9)))
    assert granted.asked("llama") == []


def test_nobody_is_asked_where_a_consent_would_change_nothing() -> None:
    for export in ("never", "allowed"):
        assert not registry(export=export).ask_consent("llama", OWNER, "ft:1")
    granted = registry(export="provider-consent")
    assert not granted.ask_consent("llama", DIGEST, "ft:1")  # no owner of the grant
    assert not granted.ask_consent("gpt", OWNER, "ft:1")
    assert granted.asked("llama") == []
