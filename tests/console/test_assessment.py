"""A check is green only where all that it rests on is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.attest.checks import Check
from obfuscatune.console.assessment import LINKS, assess_checks, link_of

TDX = (
    *("policy", "nonce", "kind.tdx", "require.tdx"),
    *("tdx.signature", "tdx.tcb_status", "tdx.report_data", "tdx.mr_td", "tdx.rtmr0"),
    *("claims.configuration", "claims.software", "claims.workers", "claims.profile", "freshness"),
)


def checks(*, fails: tuple[str, ...] = (), opens: tuple[str, ...] = ()) -> list[Check]:
    return [Check(name, name not in fails, "any" if name in opens else "this", "this") for name in TDX]


def states(**changed: tuple[str, ...]) -> dict[str, str]:
    return {link.name: link.state for link in assess_checks(checks(**changed), simulated=False).links}


def test_every_check_belongs_to_its_question() -> None:
    assert [link_of(name) for name in TDX] == [
        *("asked", "session", "asked", "asked"),
        *("hardware", "hardware", "session", "program", "program"),
        *("program", "program", "workers", "workers", "age"),
    ]
    names = (
        "sev-snp.chain.vcek",
        "nvidia[1].measurement.3",
        "sev-snp.host_data",
        "tpm.pcr.7",
        "claims.environment.PATH",
    )
    assert [link_of(name) for name in names] == ["hardware", "program", "program", "program", "program"]


def test_all_of_it_holds() -> None:
    assert set(states().values()) == {"holds"}
    assert assess_checks(checks(), simulated=False).passed


def test_what_the_policy_leaves_open_is_not_green_nor_is_what_rests_on_it() -> None:
    found = states(opens=("tdx.mr_td",))
    assert found == {
        **dict.fromkeys(("asked", "hardware", "session"), "holds"),
        **{"program": "open", "workers": "unfounded", "age": "unfounded"},
    }


def test_nothing_stands_on_hardware_that_fails() -> None:
    found = states(fails=("tdx.signature",))
    assert found["hardware"] == "fails"
    assert "holds" not in {found[it] for it in ("session", "program", "workers", "age")}


def test_simulated_evidence_is_nowhere_green() -> None:
    found = assess_checks(checks(), simulated=True)
    assert found.state == "simulated"
    assert {link.state for link in found.links[1:]} == {"simulated"}


def test_simulated_evidence_that_fails_is_nowhere_green() -> None:
    simulated = [Check(it.name.replace("tdx", "simulated"), it.name != "claims.software", "", "") for it in checks()]
    found = assess_checks(simulated)
    assert {link.name: link.state for link in found.links} == {
        **dict.fromkeys(("hardware", "session", "workers", "age"), "simulated"),
        **{"asked": "holds", "program": "fails"},
    }


def test_no_checks_have_not_passed() -> None:
    found = assess_checks((), simulated=False)
    assert not found.passed and found.state == "fails"


@given(st.sets(st.sampled_from(TDX)), st.sets(st.sampled_from(TDX)), st.booleans())
def test_no_green_below_what_is_not(fails: set[str], opens: set[str], simulated: bool) -> None:
    found = assess_checks(checks(fails=tuple(fails), opens=tuple(opens)), simulated=simulated)
    assert [it.name for it in found.links] == list(LINKS)
    assert sum(len(it.findings) for it in found.links) == len(TDX)
    green = True
    for link in found.links:
        if not green:
            assert all(
                it.state != "holds" for it in link.findings if not it.name.startswith(("policy", "kind.", "require."))
            )
        green = green and (link.state == "holds" or link.name in ("workers", "age"))
    assert found.passed == (not fails)
    assert (found.state == "holds") == (not fails and not opens and not simulated)
