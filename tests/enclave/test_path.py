"""One forward call, followed through the files that it enters: docs/architecture.md has the same list."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import obfuscatune
from obfuscatune import local_worker, native, protect

SOURCE = Path(obfuscatune.__file__).parent
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
WIDTH = 96
FEW, MANY = 2, 64


@pytest.fixture(scope="module")
def layer() -> Iterator[nn.Module]:
    """A protected layer that is no first of its kind, behind a worker of its own."""
    if not native.are_there():
        pytest.skip("no native kernels here: torch computes, by fewer files")
    config = GPT2Config(n_layer=2, n_embd=WIDTH, n_head=4, vocab_size=99, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with local_worker(threads=1) as worker:
        protect(model, worker.address, verify=1.0)
        yield model.transformer.h[1].mlp.c_fc


def files_entered(layer: nn.Module, rows: int) -> set[str]:
    """Files below the package that a call of so many rows enters, once all is as it will be."""
    x = torch.randn(1, rows, WIDTH)
    entered: set[str] = set()

    def follow(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(SOURCE):
            entered.add(path.relative_to(SOURCE).as_posix())

    with torch.no_grad():
        layer(x)
        sys.setprofile(follow)
        try:
            layer(x) + 0  # its product is waited for when it is used
        finally:
            sys.setprofile(None)
    return entered


def documented() -> list[str]:
    return re.findall(r"^\| `((?:enclave|protocol)/[\w/]+\.py)` \|", DOCUMENT.read_text("utf-8"), re.MULTILINE)


def test_a_call_enters_the_files_that_the_architecture_lists(layer: nn.Module) -> None:
    entered = files_entered(layer, FEW) | files_entered(layer, MANY)
    assert entered == set(documented())
    assert len(documented()) == len(set(documented()))
