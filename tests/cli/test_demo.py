"""`obfuscatune demo`: short, once for all of its artefacts; and whole, where there is time."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from obfuscatune.assets import tiny_model_path
from obfuscatune.cli.app import run
from obfuscatune.demo.settings import LOSS_TOLERANCE, WEIGHT_TOLERANCE
from obfuscatune.enclave.plan import make_plan, model_from_config
from obfuscatune.enclave.profiles import resolve
from tests.report.documents import check_self_contained


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A short demo: its folder, what it printed, and its exit code."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("demo") / "out"
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = run(["demo", "--quick", "--out", str(out)])
    return out, stdout.getvalue(), stderr.getvalue(), code


def test_it_succeeds_in_plain_lines(quick):
    _, shown, progress, code = quick
    assert code == 0, progress
    assert "\x1b" not in shown + progress, "a pipe gets no escape codes"
    assert "protected" in shown and "loss, last step" in shown
    assert "Next" in shown and "obfuscatune finetune" in shown
    assert "PLAIN RUN" in progress, "an unprotected run is never silent"


def test_the_result_says_what_was_measured(quick):
    out, *_ = quick
    result = json.loads((out / "result.json").read_text())
    assert result["passed"] is True
    assert [check["passed"] for check in result["checks"]] == [True] * 6
    steps = len(result["protected"]["loss"]["steps"])
    assert steps == len(result["plain"]["loss"]["steps"]) == len(result["differences"]["losses"]) == 6
    assert result["differences"]["largest_loss"] == max(result["differences"]["losses"]) <= LOSS_TOLERANCE
    assert result["differences"]["largest_adapter_weight"] <= WEIGHT_TOLERANCE < result["differences"]["largest_weight"]
    assert result["protected"]["accuracy"]["before"] == 0.0
    assert result["plain"]["link"] is None
    assert len(result["samples"]) == 4


def test_what_crossed_is_what_was_planned(quick):
    out, *_ = quick
    result = json.loads((out / "result.json").read_text())
    plan = make_plan(model_from_config(tiny_model_path()), resolve("private"))
    steps = len(result["protected"]["loss"]["steps"])
    assert result["protected"]["link"]["crossings"] == steps * (plan.forward_crossings + plan.backward_crossings)
    assert result["model"]["enclave_share"] == plan.enclave_share


def test_the_report_is_one_whole_page(quick):
    out, *_ = quick
    document = check_self_contained((out / "report.html").read_text())
    assert document.tags.count("svg") == 2
    for text in ("Training loss", "Side by side", "Settings", "Environment", "questions right, protected"):
        assert text in document.text


def test_both_adapters_load_in_plain_peft_and_agree(quick):
    out, *_ = quick
    tokens = AutoTokenizer.from_pretrained(tiny_model_path())("Question: Where does Miss", return_tensors="pt")
    logits = []
    for side in ("protected", "plain", None):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
        if side is not None:
            model = PeftModel.from_pretrained(model, out / side / "adapter")
        with torch.no_grad():
            logits.append(model.eval()(**tokens).logits)
    protected, plain, base = logits
    torch.testing.assert_close(protected, plain, rtol=0, atol=1e-3)  # float32 over six steps of AdamW
    assert (protected - base).abs().max() > 0.1, "the adapter does something"


def test_a_folder_of_others_is_refused_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert run(["demo", "--out", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    assert run(["demo", "--help"]) == 0
    assert "Example: obfuscatune demo" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_whole_demo_learns_and_agrees(tmp_path, capsys):
    assert run(["demo", "--json", "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    for side in ("protected", "plain"):
        assert result[side]["accuracy"]["before"] <= 0.05
        assert result[side]["accuracy"]["after"] >= 0.8
    assert result["differences"]["same_answers"] == result["differences"]["questions"]
