"""Small secrets at rest: only the same key, purpose and name open them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.errors import IntegrityError
from obfuscatune.sealing.blobs import OVERHEAD_BYTES, open_blob, seal_blob
from obfuscatune.secret_memory import SecretBytes

KEY = bytes(range(32))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=200), purpose=st.text(max_size=10), name=st.text(max_size=10))
def test_what_is_sealed_comes_back(data: bytes, purpose: str, name: str) -> None:
    blob = seal_blob(KEY, data, purpose=purpose, name=name)
    assert len(blob) == len(data) + OVERHEAD_BYTES
    assert open_blob(SecretBytes(KEY), blob, purpose=purpose, name=name) == data


def test_every_changed_byte_and_length_is_refused() -> None:
    blob = seal_blob(KEY, b"row", purpose="job", name="1")
    changed = [blob[:i] + bytes([blob[i] ^ 1]) + blob[i + 1 :] for i in range(len(blob))]
    for it in [*changed, *(blob[:i] for i in range(len(blob))), blob + b"\0"]:
        with pytest.raises(IntegrityError):
            open_blob(KEY, it, purpose="job", name="1")


@pytest.mark.parametrize(
    ("key", "purpose", "name"),
    [(bytes(32), "job", "1"), (KEY, "file", "1"), (KEY, "job", "2"), (KEY, "jo", "b1"), (KEY, "", "job1")],
)
def test_another_key_purpose_or_name_opens_nothing(key: bytes, purpose: str, name: str) -> None:
    blob = seal_blob(KEY, b"row", purpose="job", name="1")
    with pytest.raises(IntegrityError) as refused:
        open_blob(key, blob, purpose=purpose, name=name)
    assert "row" not in str(refused.value)


def test_two_blobs_of_the_same_have_nothing_in_common() -> None:
    one, two = (seal_blob(KEY, bytes(64), purpose="job", name="1") for _ in range(2))
    assert one[1:33] != two[1:33]
    assert one[33:] != two[33:]


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 16"):
        seal_blob(bytes(16), b"", purpose="job", name="1")
