"""What all tests share: one worker process for the session, and quiet libraries."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from obfuscatune.enclave.local_worker import LocalWorker

os.environ.update(
    OMP_NUM_THREADS="1",  # the models are tiny: threads that wait for each other cost ten times what they save
    HF_HUB_OFFLINE="1",  # nothing is fetched: what a test needs is made by it or lies in ../shared
    TRANSFORMERS_VERBOSITY="error",
    TRANSFORMERS_NO_ADVISORY_WARNINGS="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: the garbage collector looks through its half a million objects neither now nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    """At the end it may: nanobind complains of what is left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def worker() -> Iterator[LocalWorker]:
    """A worker process. Every protected model opens a session of its own with it."""
    from obfuscatune import local_worker

    with local_worker(threads=1) as running:
        yield running


@pytest.fixture(scope="session")
def mask_worker() -> Iterator[LocalWorker]:
    """A second worker process, which multiplies masks."""
    from obfuscatune import local_worker

    with local_worker(threads=1) as running:
        yield running


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch computes on two threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """Directory of a real pre-trained model of 260,032 parameters."""
    directory = SHARED / "models" / "stories260K"
    if not directory.is_dir():
        pytest.skip("the pre-trained model ../shared/models/stories260K is not on this machine")
    return directory


@pytest.fixture(scope="session")
def shared_data(pytestconfig: pytest.Config) -> Path:
    """The public question sets."""
    directory = pytestconfig.rootpath.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip("the question sets ../shared/data are not on this machine")
    return directory
