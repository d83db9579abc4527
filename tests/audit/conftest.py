"""One small scenario for the tests that record runs of it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from obfuscatune.assets import tiny_model_path
from obfuscatune.audit.scenario import Scenario, Size, make_scenario, read_text

SMALL = Size(length=16, examples=3, epochs=1, prompts=3, prompt=8, new_tokens=3, tuning_steps=2, public=20)


@pytest.fixture(scope="session")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """A model that was tuned for two steps, and text. Not to be changed."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    return make_scenario("tiny", base, tokenizer, read_text(None), tmp_path_factory.mktemp("secret"), SMALL)
