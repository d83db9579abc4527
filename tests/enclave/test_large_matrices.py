"""Very large matrices: another dtype in the same memory, images some rows at a time, tensors mapped from their file."""

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from obfuscatune.enclave import checkpoint as checkpoint_module
from obfuscatune.enclave import tiles, verification
from obfuscatune.enclave.checkpoint import Checkpoint
from obfuscatune.enclave.keys import RootKey
from obfuscatune.enclave.loading import load
from obfuscatune.enclave.tiles import at_the_end, narrowed, place_bytes, sum_of_squares, widened
from obfuscatune.enclave.verification import Verifier
from obfuscatune.errors import ModelFileError
from obfuscatune.protocol import tensors
from obfuscatune.protocol.tensors import is_finite

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_CONVERTED", 4)
    monkeypatch.setattr(verification, "CONVERTED_ELEMENTS", 20)
    monkeypatch.setattr(tensors, "_COPIED", 8)


@settings(deadline=None)
@given(SIZES, st.sampled_from(SIXTEEN), st.integers(0, 5))
def test_a_matrix_is_widened_in_the_memory_that_it_lies_in(
    shape: tuple[int, int], dtype: torch.dtype, spare: int
) -> None:
    memory = torch.empty(place_bytes(shape, torch.float32) + 4 * spare, dtype=torch.uint8)
    plain = torch.randn(shape).to(dtype)
    W = at_the_end(memory, shape, dtype, torch.float32).copy_(plain)
    wide = widened(W, memory, torch.float32)
    assert torch.equal(wide, plain.float())
    assert wide.data_ptr() == memory.data_ptr() and wide.is_contiguous()


@settings(deadline=None)
@given(SIZES, st.sampled_from([(torch.float32, torch.float16), (torch.float32, torch.bfloat16),
                               (torch.float64, torch.float32), (torch.float32, torch.float32)]))  # fmt: skip
def test_a_matrix_is_narrowed_in_its_own_memory(
    shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    wide, narrow = dtypes
    W = torch.randn(shape, dtype=wide)
    expected = W.to(narrow, copy=True)
    got = narrowed(W, narrow)
    assert torch.equal(got, expected)
    assert got.data_ptr() == W.data_ptr()


def test_a_norm_is_that_of_the_whole() -> None:
    W = torch.randn(7, 11)
    assert sum_of_squares(W) == pytest.approx(float(W.double().square().sum()))


@pytest.mark.parametrize(("stored", "travels"), [(torch.float16, None), (torch.float32, torch.float64)])
def test_images_some_rows_at_a_time_are_those_of_the_whole(stored: torch.dtype, travels: torch.dtype | None) -> None:
    W, key = torch.randn(13, 7).to(stored), RootKey.generate()
    wide = W.float() if travels is None else W.to(travels)
    verifier = Verifier(W, key.stream("v"), 1.0, dtype=travels)
    there, back = (verifier.probe(transpose=transpose) for transpose in (False, True))
    assert torch.allclose(there.V, wide.double() @ there.R, rtol=1e-4, atol=1e-4)
    assert torch.allclose(back.V, wide.double().T @ back.R, rtol=1e-4, atol=1e-4)
    assert there.norm == pytest.approx(float(wide.norm()), rel=1e-5)


@given(st.integers(1, 40), st.integers(1, 9), st.data())
@settings(deadline=None)
def test_one_number_that_is_not_finite_is_seen_wherever_it_lies(rows: int, columns: int, data: st.DataObject) -> None:
    x = torch.full((rows, columns), 60000.0, dtype=torch.float16)
    assert is_finite(x)
    i, j = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    x[i, j] = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    assert not is_finite(x)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(checkpoint_module, "MAPPED_FROM_BYTES", 256)
    made = {"small": torch.randn(3, 5), "large": torch.randn(16, 8), "narrow": torch.randn(32, 8).bfloat16()}
    save_file(made, tmp_path / "model.safetensors")
    return made


def test_a_large_tensor_is_mapped_as_it_is_stored(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    files = Checkpoint(tmp_path)
    mapped = {name: files.mapped(name, it.shape, it.dtype) for name, it in stored.items()}
    assert all(torch.equal(mapped[name], it) for name, it in stored.items())
    assert _is_mapped(mapped["large"], tmp_path) and _is_mapped(mapped["narrow"], tmp_path)
    assert not _is_mapped(mapped["small"], tmp_path)
    converted = files.mapped("narrow", stored["narrow"].shape, torch.float32)
    assert torch.equal(converted, stored["narrow"].float()) and not _is_mapped(converted, tmp_path)


def test_what_is_written_to_a_mapped_tensor_stays_here(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    before = (tmp_path / "model.safetensors").read_bytes()
    Checkpoint(tmp_path).mapped("large", stored["large"].shape, torch.float32).zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_file_that_is_too_short_is_an_error_and_no_signal(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    files = Checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - mmap.PAGESIZE // 2 if file.seek(0, 2) > mmap.PAGESIZE else 200)
    with pytest.raises(ModelFileError, match="ends too early"):
        files.mapped("large", stored["large"].shape, torch.float32)


def _is_mapped(tensor: torch.Tensor, folder: Path) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, _, end = line.split()[0].partition("-")
        if int(begin, 16) <= tensor.data_ptr() < int(end, 16):
            return str(folder) in line
    return False


def test_a_model_with_a_mapped_embedding_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from obfuscatune.assets import tiny_model_path

    ids = torch.arange(8)[None]
    with load(tiny_model_path(), profile="enclave") as plain, torch.inference_mode():
        expected = plain(input_ids=ids).logits
    monkeypatch.setattr(checkpoint_module, "MAPPED_FROM_BYTES", 1024)
    with load(tiny_model_path(), profile="enclave") as mapped, torch.inference_mode():
        embedding = mapped.get_input_embeddings().weight
        assert _is_mapped(embedding, tiny_model_path().resolve())
        assert torch.equal(mapped(input_ids=ids).logits, expected)
