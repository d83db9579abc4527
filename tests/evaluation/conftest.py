"""A real model."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def model(stories260k: Path) -> PreTrainedModel:
    """A model that has learned to write stories for children."""
    return AutoModelForCausalLM.from_pretrained(stories260k).eval()


@pytest.fixture(scope="session")
def tokenizer(stories260k: Path) -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(stories260k)
