"""What is said follows from the figures, and says no more."""

from __future__ import annotations

from obfuscatune.attacks.base import Attack, Attacker, Finding, NotRun
from obfuscatune.attacks.registry import ATTACKS
from obfuscatune.audit.document import as_json, as_markdown
from obfuscatune.audit.grid import Cell, Grid, attacks_of
from obfuscatune.audit.page import render
from obfuscatune.audit.verdict import Verdict, exceeding, verdicts

BY_NAME: dict[str, Attack] = {attack.name: attack for attack in ATTACKS}
LUCK = Finding(0.51, 0.5, 1.0, 100, error=0.05)
SUCCESS = Finding(0.99, 0.5, 1.0, 100, error=0.05)


def cell(profile: str, attack: str, *results: Finding | NotRun) -> Cell:
    return Cell("tiny", profile, BY_NAME[attack], results)


def grid(*cells: Cell) -> Grid:
    return Grid(cells, 1, {"tiny": 0.05})


def the_verdict(*cells: Cell) -> Verdict:
    return verdicts(grid(*cells))[0]


def test_luck_is_withstood() -> None:
    it = the_verdict(cell("private", "equal-rows", LUCK))
    assert it.holds and it.promised
    assert "enough, as far as one attack" in it.text


def test_success_breaks_a_promise() -> None:
    it = the_verdict(cell("private", "equal-rows", SUCCESS))
    assert not it.holds
    assert "THE PROMISE IS BROKEN" in it.text and "0.99 (chance 0.50; tiny)" in it.text


def test_weights_may_be_open_where_tokens_alone_were_promised() -> None:
    it = the_verdict(cell("guarded", "two-sided-alignment", SUCCESS), cell("guarded", "bag-of-tokens", LUCK))
    assert not it.holds
    assert "enough for tokens, not for the rest" in it.text and "PROMISE" not in it.text


def test_where_nothing_was_promised_none_is_broken() -> None:
    it = the_verdict(cell("identity", "equal-rows", SUCCESS))
    assert "not enough" in it.text and "PROMISE" not in it.text


def test_what_could_not_be_run_is_not_withstood() -> None:
    it = the_verdict(cell("private", "source-separation", NotRun("one row")))
    assert not it.holds and it.withstood == 0 and it.not_run == 1
    assert "nothing is known" in it.text and "Could not be run, so not withstood: one attack" in it.text


def test_an_attack_that_fails_on_identity_too_is_not_withstood() -> None:
    it = the_verdict(cell("private", "equal-rows", LUCK), cell("identity", "equal-rows", LUCK))
    assert not it.holds and it.powerless == 1
    assert "Too weak here" in it.text


def test_structure_is_named_and_breaks_nothing() -> None:
    it = the_verdict(cell("private", "equal-rows", LUCK), cell("private", "equal-beginnings", SUCCESS))
    assert it.holds
    assert "Also open: equal-beginnings" in it.text


def test_the_limit_is_on_tokens_and_weights_beyond_noise() -> None:
    it = grid(
        cell("private", "equal-rows", SUCCESS),
        cell("private", "equal-tokens-decoding", LUCK),
        cell("private", "equal-beginnings", SUCCESS),
    )
    assert [found.attack.name for found in exceeding(it, 0.1)] == ["equal-rows"]
    assert exceeding(it, 0.99) == []


def test_seeds_that_differ_widen_the_error() -> None:
    steady = cell("private", "equal-rows", SUCCESS, SUCCESS, SUCCESS)
    wavering = cell("private", "equal-rows", SUCCESS, LUCK, Finding(0.1, 0.5, 1.0, 100, error=0.05))
    assert steady.succeeds and not wavering.succeeds
    assert wavering.error > steady.error


def test_attackers_have_their_attacks() -> None:
    assert {attack.needs for attack in attacks_of(Attacker.CLOSED)} == {Attacker.CLOSED}
    assert attacks_of(None) == list(ATTACKS)


def test_documents_show_figure_and_chance_and_what_was_not_run() -> None:
    it = grid(cell("private", "equal-rows", SUCCESS), cell("private", "source-separation", NotRun("one <row>")))
    (first, second) = as_json(it, {})["cells"]
    assert (first["value"], first["chance"], first["succeeds"]) == (0.99, 0.5, True)
    assert second["not_run"] == "one <row>" and "value" not in second
    assert "**0.99 (0.50)**" in as_markdown(it) and "not run" in as_markdown(it)
    page = render(it, {"python": "3"})
    assert "0.990" in page and "chance 0.500" in page and "one &lt;row&gt;" in page
    assert "http://" not in page and "https://" not in page


def test_what_was_taken_back_is_named_and_breaks_nothing() -> None:
    it = the_verdict(cell("private", "equal-tokens-decoding", SUCCESS), cell("private", "equal-rows", LUCK))
    assert not it.holds
    assert "PROMISE" not in it.text and "Not promised, and open: equal-tokens-decoding 0.99" in it.text
    broken = the_verdict(cell("private", "equal-tokens-decoding", SUCCESS), cell("private", "equal-rows", SUCCESS))
    assert "THE PROMISE IS BROKEN" in broken.text
    assert "BROKEN" in the_verdict(cell("guarded", "equal-tokens-decoding", SUCCESS)).text
