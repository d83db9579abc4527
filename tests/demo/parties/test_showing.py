"""What is shown says whether everything held, and what did not."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from obfuscatune.cli.app import run
from obfuscatune.demo.parties.page import render
from obfuscatune.demo.parties.result import Refusal, Result, Scene, Searched, Step, document
from obfuscatune.demo.parties.run import PartiesSettings
from obfuscatune.demo.parties.terminal import TerminalScreen, print_result
from obfuscatune.errors import ConfigError


def scene(**changes: object) -> Scene:
    made = Scene(
        "private",
        [Step("provider", "seals <the> model", "manifest 12", 1.5)],
        [Refusal("bob", "asks for alice's job", "404 No such job", held=True)],
        [Searched("network", 12.5, {"data": 0}), Searched("control: notes", 0.1, {"data": 7}, is_control=True)],
        [3.0, 2.0, 1.0],
        [("who?", "Ann", "no", " Ann"), ("where?", "here", "no", "there")],
        {"data": 40},
        {"the answers agree": True},
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def result(*scenes: Scene) -> Result:
    return Result(scenes, False, "openai 3", {"python": "3.11"}, 100.0)


BROKEN = {
    "a refusal that was none": {"refusals": [Refusal("bob", "asks", "it worked", held=False)]},
    "a canary that was found": {"searches": [Searched("network", 1.0, {"data": 1})]},
    "a control that finds nothing": {"searches": [Searched("control", 1.0, {"data": 0}, is_control=True)]},
    "something that does not hold": {"checks": {"the answers agree": False}},
    "nothing tried": {"refusals": []},
    "nothing searched": {"searches": []},
}


def test_all_is_well() -> None:
    good = result(scene(), scene())
    assert good.passed and good.scenes[0].failures() == []
    page = render(good)
    assert "found neither text, adapter nor weights" in page
    assert "seals &lt;the&gt; model" in page
    assert json.loads(json.dumps(document(good)))["scenes"][0]["searches"][1]["held"] is True


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_hold_fails_the_whole(what: str, capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    bad = result(scene(), scene(**BROKEN[what]))
    assert not bad.passed
    assert document(bad)["passed"] is False
    print_result(bad, tmp_path)
    shown = capsys.readouterr().out
    assert "nothing leaked" not in shown
    if not what.startswith("nothing"):
        assert "FAILED  private: " in shown
        assert "Something is not as it should be" in render(bad)


def test_each_refusal_is_one_line() -> None:
    console = Console(file=io.StringIO(), width=40)
    screen = TerminalScreen(console)
    with screen.shown():
        screen.doing("something")
        screen.step(Step("alice", "asks", "", 0.1))
        screen.refusal(Refusal("bob", "asks for alice's job", "404 No such job " * 9, held=True))
        screen.refusal(Refusal("bob", "asks", "it worked", held=False))
        screen.searched(Searched("network", 1.0, {"data": 0}))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("  refused:  bob asks for alice's job: 404")
    assert "NOT REFUSED" in lines[2] and "nothing found" in lines[3]


@pytest.mark.parametrize("changes", [{"profiles": ("paper",)}, {"seed": -1}])
def test_settings_that_cannot_be_played_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PartiesSettings(**changes)  # type: ignore[arg-type]


def test_the_command_refuses_them_before_it_writes_anything(tmp_path) -> None:
    assert run(["demo", "--three-parties", "--profile", "paper", "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("profile", ["private", "guarded"])
def test_the_whole_demo(profile: str, tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing of text, adapter or weights leaves the enclave, and the controls find all of them."""
    out = tmp_path / "out"
    code = run(["demo", "--three-parties", "--quick", "--profile", profile, "--json", "--out", str(out)])
    said = capfd.readouterr()
    assert code == 0, said.err[-3000:]
    (played,) = json.loads(said.out)["scenes"]
    assert played["failures"] == []
    assert all(it["held"] for it in played["refusals"])
    assert len(played["refusals"]) >= {"private": 14, "guarded": 1}[profile]
    searched = {it["place"]: it for it in played["searches"]}
    network = next(it for place, it in searched.items() if place.startswith("the network"))
    assert network["megabytes"] > 10 and sum(network["found"].values()) == 0
    of_model = searched["control: the provider's model"]["found"]
    assert of_model["base model"] > played["canaries"]["base model"] / 8, "one dtype of four, one order of two"
    assert searched["control: alice's notes"]["found"]["data"] > 20
    assert searched["control: alice's adapter"]["found"]["adapter"] > 100
    if profile == "private":
        assert searched["control: transcripts of an untransformed model"]["found"]["base model"] > 20
    assert sorted(it.name for it in out.iterdir()) == [".obfuscatune-demo", profile, "report.html", "result.json"]
    assert not (out / profile / "network").exists()
