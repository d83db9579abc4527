"""The small model and its questions, made once."""

from pathlib import Path

import pytest

from obfuscatune.reproduction import presets
from tests.reproduction import made


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random model."""
    return made.model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with six questions of each task."""
    return made.questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture
def small_preset(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `smoke` smaller still."""
    monkeypatch.setitem(presets.PRESETS, "smoke", made.preset(tiny / "config.json"))
