"""The search finds every canary wherever it lies, and nothing else."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from obfuscatune.assets import tiny_model_path
from obfuscatune.demo.parties import canaries
from obfuscatune.demo.parties.canaries import Canary, Search

SECRET = "the code word is 7f3a9c"
patterns = st.lists(st.binary(min_size=15, max_size=40), min_size=1, max_size=30, unique=True)


@settings(max_examples=40, deadline=None)
@given(patterns, st.binary(max_size=200), st.data())
def test_every_canary_is_found_at_every_place(found: list[bytes], around: bytes, data: st.DataObject) -> None:
    search = Search(Canary("kind", str(number), it) for number, it in enumerate(found))
    chosen = data.draw(st.integers(0, len(found) - 1))
    at = data.draw(st.integers(0, len(around)))
    hits = search.in_bytes(around[:at] + found[chosen] + around[at:])
    assert str(chosen) in {it.what for it in hits}
    assert all(it.pattern in around[:at] + found[chosen] + around[at:] for it in hits)


@settings(max_examples=40, deadline=None)
@given(patterns, st.binary(max_size=400))
def test_the_search_is_that_of_python(found: list[bytes], data: bytes) -> None:
    search = Search(Canary("kind", it.hex(), it) for it in found)
    assert {it.pattern for it in search.in_bytes(data)} == {it for it in found if it in data}


@pytest.mark.parametrize("before", [0, 1, 7, 8, 1000])
def test_a_canary_across_two_chunks_is_found(before: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(canaries, "_CHUNK_BYTES", 1009)
    search = Search(canaries.of_text("data", [SECRET]))
    (tmp_path / "file").write_bytes(bytes(before) + SECRET.encode() + bytes(3000))
    assert [it.what for it in search.in_file(tmp_path / "file", "file")] == ["UTF-8"]
    assert search.searched == before + len(SECRET) + 3000


@pytest.mark.parametrize(
    "written",
    [
        json.dumps({"text": SECRET}).encode(),
        SECRET.encode("utf-16"),
        SECRET.encode().hex().encode(),
        *(base64.b64encode(b"x" * skipped + SECRET.encode() + b"more") for skipped in range(3)),
    ],
)
def test_text_is_found_however_it_was_written(written: bytes) -> None:
    assert Search(canaries.of_text("data", [SECRET])).in_bytes(b"\x01\x02" + written + b"\x03")


def test_text_that_could_be_chance_is_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes"):
        Search(canaries.of_text("data", ["short"]))


@pytest.mark.parametrize("dtype", ["<i8", "<i4", "<u2"])
def test_token_ids_are_found(dtype: str) -> None:
    ids = [5, 900, 3, 17, 2000, 4, 11, 12, 13]
    written = np.asarray([1, *ids, 2], dtype=dtype).tobytes()
    assert Search(canaries.of_tokens("data", [ids])).in_bytes(b"zzz" + written)
    assert not Search(canaries.of_tokens("data", [ids])).in_bytes(np.asarray(ids[::-1], dtype=dtype).tobytes())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_found_in_every_dtype_and_both_orders(dtype: torch.dtype, transposed: bool, tmp_path) -> None:
    tensors = canaries.tensors_of(tiny_model_path() / "model.safetensors")
    search = Search(canaries.of_tensors("base", tensors))
    weight = tensors["transformer.h.2.attn.c_proj.weight"]
    written = (weight.T if transposed else weight).to(dtype).contiguous()
    save_file({"w": written}, tmp_path / "file")
    assert any("h.2.attn.c_proj.weight" in it.what for it in search.in_file(tmp_path / "file", "file"))
    rotated = written.double() @ torch.linalg.qr(torch.randn(written.shape[1], written.shape[1]).double())[0]
    save_file({"w": rotated.to(dtype)}, tmp_path / "rotated")
    assert search.in_file(tmp_path / "rotated", "rotated") == []


def test_weights_that_say_nothing_are_no_canaries() -> None:
    assert list(canaries.of_tensors("adapter", {"zeros": torch.zeros(8, 8), "ones": torch.ones(8, 8)})) == []


def test_what_is_in_a_files_name_is_found(tmp_path) -> None:
    (tmp_path / SECRET).write_bytes(b"nothing")
    (tmp_path / "elsewhere").write_bytes(SECRET.encode())
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    search = Search(canaries.of_text("data", [SECRET]))
    assert sorted(it.where.rpartition("/")[2] for it in search.below(tmp_path)) == ["elsewhere", SECRET]
