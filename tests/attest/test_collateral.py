"""Collateral in a folder: fetched once, fetched anew, and kept while there is nothing newer."""

from __future__ import annotations

import json

import pytest

from obfuscatune.attest.collateral import CollateralCache
from obfuscatune.attest.evidence import Evidence
from obfuscatune.errors import ConfigError, EvidenceError

pytest.importorskip("dcap_qvl")

NOW = 1_751_000_000
DAY = 86_400


@pytest.fixture
def quote(sample):
    return Evidence("tdx", sample("tdx-phala/tdx_quote"), (), {"of": "the attester"})


@pytest.fixture
def collateral(sample):
    return json.loads(sample("tdx-phala/tdx_quote_collateral.json"))


class Source:
    """Intel's service, or none."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), 0

    def __call__(self, quote):
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_what_is_fetched_replaces_the_attesters_and_is_kept(tmp_path, quote, collateral):
    source = Source(collateral)
    cache = CollateralCache(tmp_path / "made", source)
    for now in (NOW, NOW + DAY - 1):
        assert cache.complete(quote, now).collateral == collateral
    assert source.asked == 1
    assert CollateralCache(tmp_path / "made").complete(quote, NOW).collateral == collateral


def test_after_a_day_it_is_fetched_anew(tmp_path, quote, collateral):
    newer = collateral | {"pck_crl_issuer_chain": "newer"}
    cache = CollateralCache(tmp_path, Source(collateral, newer))
    cache.complete(quote, NOW)
    assert cache.complete(quote, NOW + DAY).collateral == newer


def test_while_the_source_is_away_what_is_kept_serves_until_it_expires(tmp_path, quote, collateral):
    away = EvidenceError("away")
    cache = CollateralCache(tmp_path, Source(collateral, away, away, away))
    cache.complete(quote, NOW)
    assert cache.complete(quote, NOW + 2 * DAY).collateral == collateral
    with pytest.raises(EvidenceError, match="away"):
        cache.complete(quote, NOW + 40 * DAY)
    with pytest.raises(EvidenceError, match="away"):  # a clock that was set back
        cache.complete(quote, NOW - DAY)


def test_without_a_source_the_attesters_serves(tmp_path, quote):
    assert CollateralCache(tmp_path).complete(quote, NOW) == quote


def test_other_platforms_have_files_of_their_own(tmp_path, quote, sample, collateral):
    other = Evidence("tdx", sample("tdx-phala/near_quote.bin"))
    cache = CollateralCache(tmp_path, Source(collateral, {"of": "another"}))
    cache.complete(quote, NOW)
    assert cache.complete(other, NOW).collateral == {"of": "another"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tdx-20A06F000000-platform.json",
        "tdx-B0C06F000000-platform.json",
    ]


def test_parts_of_evidence_are_completed_and_kept(tmp_path, quote, collateral):
    evidence = Evidence("simulated", b"x", parts=(quote, Evidence("nvidia", b"y", collateral={"a": "b"})))
    found = CollateralCache(tmp_path, Source(collateral)).complete(evidence, NOW)
    assert [part.kind for part in found.each] == ["simulated", "tdx", "nvidia"]
    assert (found.parts[0].collateral, found.parts[1].collateral) == (collateral, {"a": "b"})


@pytest.mark.parametrize("content", [b"", b"junk", b"{}", b'{"fetched": true, "collateral": {}}', b"x" * 600_000])
def test_a_file_that_is_none_is_fetched_anew(tmp_path, quote, collateral, content):
    (tmp_path / "tdx-B0C06F000000-platform.json").write_bytes(content)
    assert CollateralCache(tmp_path, Source(collateral)).complete(quote, NOW).collateral == collateral


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, quote, collateral):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot keep collateral"):
        CollateralCache(tmp_path / "file" / "folder", Source(collateral)).complete(quote, NOW)


def test_what_is_no_quote_is_refused(tmp_path):
    with pytest.raises(EvidenceError):
        CollateralCache(tmp_path).complete(Evidence("tdx", b"junk"), NOW)
