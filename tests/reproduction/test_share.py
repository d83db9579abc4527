"""Parameters in the enclave, against a count by hand from the architecture."""

import pytest

from obfuscatune.reproduction.costs import share_cell
from obfuscatune.reproduction.run import unwatched

VOCABULARY, POSITIONS = 50257, 1024


@pytest.mark.parametrize(
    ("shape", "width", "depth", "share"),
    [
        ("gpt2", 768, 12, 31.7),
        ("gpt2-medium", 1024, 24, 14.9),
        ("gpt2-large", 1280, 36, 8.6),
        ("gpt2-xl", 1600, 48, 5.3),
    ],
)
def test_gpt2_as_counted_by_hand(shape, width, depth, share):
    result = share_cell(shape).measure(unwatched)
    block_matrices = 12 * width * width  # c_attn 3, c_proj 1, c_fc 4, c_proj 4
    block_vectors = 4 * width + (3 + 1 + 4 + 1) * width  # two norms; biases
    embeddings = (VOCABULARY + POSITIONS) * width  # the head is tied to them
    enclave = embeddings + depth * block_vectors + 2 * width
    assert result["enclave"]["paper"] == enclave
    assert result["parameters"] == enclave + depth * block_matrices
    assert 100 * result["share"]["paper"] == pytest.approx(share, abs=0.05)
    assert result["enclave"]["private"] == enclave + block_matrices, "private keeps the first block"
