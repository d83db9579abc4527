"""What is said follows from the figures, and says no more."""

from __future__ import annotations

import pytest

from obfuscatune.audit.attacks.base import Attack, Attacker, Finding, NotRun
from obfuscatune.audit.attacks.registry import ATTACKS
from obfuscatune.audit.grid import Cell, Grid, attacks_of
from obfuscatune.audit.parties import MaskAccount
from obfuscatune.audit.report import as_json, as_markdown, print_grid, render
from obfuscatune.audit.verdict import State, Verdict, advice, exceeding, verdicts

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
    assert it.state is State.HOLDS and it.promised
    assert "none of one attack on tokens and weights succeeds" in it.text


def test_success_breaks_a_promise() -> None:
    it = the_verdict(cell("private", "equal-rows", SUCCESS))
    assert it.state is State.BROKEN
    assert "THE PROMISE IS BROKEN" in it.text and "0.99 (chance 0.50; tiny)" in it.text


@pytest.mark.parametrize("profile", ["private", "guarded, both", "identity"])
def test_one_worker_that_sees_rows_promises_nothing_against_a_public_base(profile: str) -> None:
    it = the_verdict(cell(profile, "bag-of-tokens", SUCCESS))
    assert it.state is State.OPEN and not it.promised
    assert "open, and not promised" in it.text and "BROKEN" not in it.text


@pytest.mark.parametrize("profile", ["guarded", "guarded, mask worker"])
def test_each_party_of_guarded_promises_tokens_against_a_public_base(profile: str) -> None:
    assert the_verdict(cell(profile, "bag-of-tokens", SUCCESS)).state is State.BROKEN
    weights = the_verdict(cell(profile, "two-sided-alignment", SUCCESS))
    assert weights.state is State.OPEN and "open, and not promised" in weights.text


def test_one_party_of_guarded_must_not_tell_texts_apart() -> None:
    columns = ("guarded", "guarded, mask worker", "guarded, both", "private")
    found = [the_verdict(cell(name, "equal-examples", SUCCESS), cell(name, "equal-rows", LUCK)) for name in columns]
    assert [it.state for it in found] == [State.BROKEN, State.BROKEN, State.HOLDS, State.HOLDS]
    assert "THE PROMISE IS BROKEN. equal-examples 0.99" in found[0].text


def test_both_parties_promise_what_private_does() -> None:
    for attack in ("equal-tokens-decoding", "equal-rows", "shared-rows"):
        alone, both = (the_verdict(cell(profile, attack, SUCCESS)) for profile in ("private", "guarded, both"))
        assert (alone.promised, alone.state) == (both.promised, both.state)
        assert "guarded (both workers, if they collude) against" in both.text
    assert "guarded (the mask worker alone)" in the_verdict(cell("guarded, mask worker", "equal-rows", LUCK)).text


def test_a_profile_is_taken_if_each_of_its_columns_keeps_its_promise() -> None:
    columns = ("guarded", "guarded, mask worker", "guarded, both")
    kept = [cell(name, "equal-rows", LUCK) for name in columns]
    assert "take guarded, whose two workers must not collude, which keeps" in advice(grid(*kept))
    for name in columns:
        broken = cell(name, "equal-rows", SUCCESS)
        rest = [it for it in kept if it.profile != name]
        assert "none of the audited profiles kept its promise" in advice(grid(broken, *rest))
    linked = cell("guarded, both", "equal-tokens-decoding", SUCCESS)
    assert "take guarded" in advice(grid(*kept, linked))
    public = [cell(name, "bag-of-tokens", LUCK) for name in columns]
    assert "published model, take guarded, whose two workers must not collude" in advice(grid(*public))
    read = cell("guarded", "bag-of-tokens", SUCCESS)
    assert "none of the audited profiles was found to hide its tokens" in advice(grid(read))


def test_the_limit_is_not_on_what_both_parties_see() -> None:
    it = grid(*(cell(name, "equal-rows", SUCCESS) for name in ("guarded", "guarded, mask worker", "guarded, both")))
    assert [found.profile for found in exceeding(it, 0.1)] == ["guarded", "guarded, mask worker"]


def test_every_report_has_the_account_of_the_masks(capsys: pytest.CaptureFixture[str]) -> None:
    masks = {("tiny", "guarded"): MaskAccount(12345, 6.7e-6, 0.01)}
    it = Grid(
        (cell("guarded", "equal-rows", LUCK), cell("guarded, both", "equal-rows", LUCK)), 1, {"tiny": 0.05}, masks
    )
    print_grid(it)
    for shown in (as_markdown(it), render(it, {}), capsys.readouterr().out):
        assert "guarded, both" in shown and "12,345 rows were sent under masks" in shown and "6.7e-06" in shown
    assert as_json(it, {})["masks"] == [
        {"model": "tiny", "profile": "guarded", "rows": 12345, "advantage": 6.7e-6, "budget": 0.01}
    ]
    assert "masks" not in as_markdown(grid(cell("private", "equal-rows", LUCK)))


def test_what_could_not_be_run_is_not_withstood() -> None:
    it = the_verdict(cell("private", "source-separation", NotRun("one row")))
    assert it.state is State.UNKNOWN and it.withstood == 0 and it.not_run == 1
    assert "nothing is known" in it.text and "Could not be run, so not withstood: one attack" in it.text


def test_an_attack_that_fails_on_identity_too_is_not_withstood() -> None:
    it = the_verdict(cell("private", "equal-rows", LUCK), cell("identity", "equal-rows", LUCK))
    assert it.state is State.UNKNOWN and it.powerless == 1
    assert "Too weak here" in it.text


def test_structure_is_named_and_breaks_nothing() -> None:
    it = the_verdict(cell("private", "equal-rows", LUCK), cell("private", "equal-beginnings", SUCCESS))
    assert it.state is State.HOLDS
    assert "matrices aligned by equal-beginnings" in it.text


def test_an_effect_that_is_sure_but_too_small_to_matter_is_no_success() -> None:
    sure = Finding(0.505, 0.5, 1.0, 10**6, error=0.0005)
    assert not cell("private", "equal-rows", sure).succeeds
    assert cell("private", "equal-rows", Finding(0.52, 0.5, 1.0, 10**6, error=0.0005)).succeeds


def test_the_advice_follows_from_the_figures() -> None:
    holds, broken = cell("private", "equal-rows", LUCK), cell("private", "equal-rows", SUCCESS)
    assert "take private" in advice(grid(holds)) and "no promise to hide its tokens was put to the test" in advice(
        grid(holds)
    )
    assert "take guarded" in advice(grid(broken, cell("guarded", "equal-rows", LUCK)))
    assert "none of the audited profiles kept its promise" in advice(grid(broken))
    assert "nothing was audited that promises" in advice(grid(cell("paper", "equal-rows", LUCK)))


def test_no_red_box_says_enough_and_the_advice_comes_first() -> None:
    it = grid(cell("private", "equal-tokens-decoding", SUCCESS), cell("private", "equal-rows", LUCK))
    page = render(it, {})
    assert 'class="verdict bad"' not in page and "enough" not in page
    assert page.index("take private") < page.index("Who learns tokens or weights") < page.index("Attacks on tiny")


def test_print_and_markdown_say_why_an_attack_was_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    it = grid(cell("private", "source-separation", NotRun("too few rows")), cell("private", "equal-rows", LUCK))
    assert "- source-separation (private on tiny): too few rows" in as_markdown(it)
    print_grid(it)
    assert "not run: source-separation (private on tiny): too few rows" in capsys.readouterr().out


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
    for attack in ("equal-tokens-decoding", "moments-decoding", "shared-rows"):
        it = the_verdict(cell("private", attack, SUCCESS), cell("private", "equal-rows", LUCK))
        assert it.state is State.OPEN
        assert "BROKEN" not in it.text and f"open, and not promised: {attack} 0.99" in it.text
        broken = the_verdict(cell("private", attack, SUCCESS), cell("private", "equal-rows", SUCCESS))
        assert "THE PROMISE IS BROKEN" in broken.text
