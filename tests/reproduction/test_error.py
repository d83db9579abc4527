"""The error is that of the logits against plain float64, and a depth of d is the model with d blocks."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from obfuscatune.reproduction.error import ErrorStudy, logits_by_depth
from obfuscatune.reproduction.opening import Opening, Subject
from obfuscatune.reproduction.presets import Method, ShapeDepth
from obfuscatune.reproduction.run import unwatched
from tests.reproduction import made

SIZE = {"n_embd": 64, "n_head": 2, "n_positions": 32, "vocab_size": 50}


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    GPT2Config(n_layer=2, **SIZE).save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture(scope="module")
def measured(shape, tiny, worker):
    """Error cells of several methods, on the session's worker."""
    opening = Opening.__new__(Opening)
    opening.__dict__["worker"] = worker.address
    study = ErrorStudy(Subject.find(str(tiny)), opening, made.preset(shape))
    names = ("plain", "private", "paper", "conditioned(8)", "conditioned(160)", "gaussian")
    return {name: study.of_shape(ShapeDepth(str(shape)), name).measure(unwatched) for name in names}


def test_depths_are_models_of_that_many_blocks():
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, **SIZE)).eval()
    ids = torch.arange(12)[None]
    by_depth = logits_by_depth(model, ids, [1, 3])
    assert len(model.transformer.h) == 3, "the model is whole again"
    torch.testing.assert_close(by_depth[1], model(ids).logits.double())
    model.transformer.h = model.transformer.h[:1]
    torch.testing.assert_close(by_depth[0], model(ids).logits.double())


def test_rounding_alone_is_that_of_the_number_format(measured):
    errors = measured["plain"]["errors"]
    for dtype in ("float32", "bfloat16", "float16"):
        epsilon = torch.finfo(getattr(torch, dtype)).eps
        assert all(epsilon / 50 < error < 10 * epsilon for error in errors[dtype])


def test_orthogonal_matrices_add_little(measured):
    for method in ("private", "paper"):
        for dtype, errors in measured[method]["errors"].items():
            assert errors[-1] < 5 * measured["plain"]["errors"][dtype][-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_error_grows_with_the_condition_number(measured, dtype):
    errors = [measured[name]["errors"][dtype][-1] for name in ("paper", "conditioned(8)", "conditioned(160)")]
    assert errors == sorted(errors)
    assert errors[-1] > 3 * errors[0]


def test_methods_are_told_apart_in_the_settings(shape, tiny):
    study = ErrorStudy(Subject.find(str(tiny)), Opening.__new__(Opening), made.preset(shape))
    cells = [study.of_subject(name) for name in ("plain", "gaussian")]
    assert cells[0].key != cells[1].key
    assert isinstance(Method("plain", None, {}), Method)
