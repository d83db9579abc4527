"""Every example runs as it is written, in a folder of its own, and does what its first line says."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from obfuscatune.assets import tiny_model_path

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs an example, as `python` would in a folder of its own; what it prints, on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> str:
        with warnings.catch_warnings(action="ignore"):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return "".join(capfd.readouterr())

    return run


def adds_something(adapter: Path) -> bool:
    """Whether an adapter loads into the plain model and was trained: its B factors begin as zeros."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype="float32")
    adapted = PeftModel.from_pretrained(plain, str(adapter))
    factors = {name: parameter for name, parameter in adapted.named_parameters() if "lora_B" in name}
    return len(factors) > 0 and all(factor.abs().max() > 0 for factor in factors.values())


def test_trainer(run: Callable[[str], str], tmp_path: Path) -> None:
    assert "'loss'" in run("trainer.py")
    assert adds_something(tmp_path / "adapter")


@pytest.mark.skipif(find_spec("trl") is None, reason="the extra trl is not installed")
def test_trl_sft(run: Callable[[str], str], tmp_path: Path) -> None:
    assert "'loss'" in run("trl_sft.py")
    assert adds_something(tmp_path / "adapter")


def test_remote_worker(run: Callable[[str], str], tmp_path: Path) -> None:
    assert "It was late in the evening when" in run("remote_worker.py")


def test_evaluation(run: Callable[[str], str], tmp_path: Path) -> None:
    printed = run("evaluation.py")
    assert "same answers 6 of 6" in printed
    plain, protected = (float(line.split()[-1]) for line in printed.splitlines() if line.startswith("loss, "))
    assert protected == pytest.approx(plain, abs=1e-4)  # nats: rounding of float32 products, as tests/contract has it


def test_every_example_is_listed_and_tested() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    tests = Path(__file__).read_text("utf-8")
    assert len(names) >= 4
    for name in names:
        assert f"[{name}]({name})" in listed
        assert f'run("{name}"' in tests
