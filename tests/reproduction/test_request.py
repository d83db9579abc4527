"""What a user asks for is laid over the preset, or refused before anything is computed."""

from pathlib import Path

import pytest

from obfuscatune.errors import ConfigError
from obfuscatune.reproduction.presets import PRESETS, TASKS, find_method
from obfuscatune.reproduction.request import Request


def resolve(**changed):
    asked = {"preset": "cpu", "parts": ["share"], "tasks": TASKS, "methods": None, "seeds": None, "model": None,
             "data_root": None, "records": None, "limit": None}  # fmt: skip
    return Request.resolve(Path("out"), **{**asked, **changed})


def test_the_paper_preset_is_the_papers_recipe():
    paper = PRESETS["paper"]
    assert (paper.epochs, paper.lr, paper.batch_size, paper.records, paper.questions) == (10, 3e-5, 1, None, None)
    assert len(paper.seeds) >= 3
    assert {"conditioned(1)", "conditioned(8)", "conditioned(32)", "conditioned(128)", "conditioned(160)"} < set(
        paper.ablations
    )


def test_the_preset_is_kept_where_nothing_else_is_asked():
    assert resolve().preset == PRESETS["cpu"]


def test_choices_replace_the_presets():
    request = resolve(methods=["gaussian", "private", "conditioned(8)"], seeds=[3, 4, 3], records=7, limit=5)
    assert request.preset.methods == ("plain", "private"), "plain is what all others are compared with"
    assert request.preset.ablations == ("gaussian", "conditioned(8)")
    assert request.preset.seeds == (3, 4)
    assert request.preset.questions == 5
    assert request.preset.records == 7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preset": "huge"}, "unknown preset 'huge'; the presets are paper, cpu, real, smoke"),
        ({"parts": ["speed"]}, "unknown part 'speed'; the parts are accuracy, error"),
        ({"parts": []}, "--parts: expected at least one"),
        ({"tasks": ["mmlu"]}, "unknown task 'mmlu'"),
        ({"methods": ["rot13"]}, "unknown method 'rot13'; known are plain"),
        ({"methods": ["conditioned(x)"]}, "unknown transform"),
        ({"seeds": [-1]}, "--seeds: expected 0 or more, found -1"),
        ({"records": 0}, "--records: expected at least 1, found 0"),
        ({"limit": 0}, "--limit: expected at least 1, found 0"),
    ],
)
def test_what_is_not_known_is_refused(changed, message):
    with pytest.raises(ConfigError) as refused:
        resolve(**changed)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "kappa"), [("plain", None), ("paper", 1), ("private", 1), ("gaussian", None), ("conditioned(32)", 32)]
)
def test_methods_know_their_condition_number(name, kappa):
    assert find_method(name).condition_number == kappa


def test_ablations_are_the_papers_scheme_with_other_matrices():
    method = find_method("conditioned(8)")
    assert (method.profile, method.knobs) == ("paper", {"transform": "conditioned(8)"})
