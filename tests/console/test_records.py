"""The check of a file says what the service will say of it, line by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.console.records import MOST_FAULTS, check_records
from obfuscatune.errors import DataError
from obfuscatune.service.api.files import check_training_data

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
GOOD = st.builds(lambda a, b: json.dumps({"prompt": a, "completion": b}), TEXT, TEXT)
CHAT = st.builds(
    lambda a, b: json.dumps({"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}),
    TEXT,
    TEXT,
)
BAD = st.sampled_from(
    [
        '{"prompt": "a"}',
        "[]",
        "no json",
        '{"a": 1, "a": 2}',
        '{"text": "t"}',
        '{"prompt": NaN}',
        "\ufeff{}",
        '"\\ud800"',
    ]
)
FILES = st.lists(GOOD | CHAT | BAD | st.sampled_from(["", "  ", "\r"]), max_size=6)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FILES, st.booleans(), st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff"]))
def test_a_file_is_usable_where_the_service_takes_it(
    tmp_path: Path, lines: list[str], ends: bool, start: bytes
) -> None:
    content = start + "\n".join(lines).encode("utf-8", "surrogatepass") + (b"\n" if ends else b"")
    (tmp_path / "f.jsonl").write_bytes(content)
    checked = check_records(content)
    try:
        count, layout = check_training_data(tmp_path / "f.jsonl")
    except DataError as error:
        assert not checked.is_usable
        if checked.faults and ".jsonl:" in str(error):
            assert int(str(error).split(".jsonl:")[1].split(":")[0]) == checked.faults[0].line
    else:
        assert checked.is_usable
        assert (checked.records, checked.layout) == (count, layout)


@given(st.binary(max_size=60))
def test_any_bytes_are_checked(content: bytes) -> None:
    checked = check_records(content)
    assert checked.faulty >= len(checked.faults)
    assert not checked.is_usable or checked.records


def test_every_line_that_is_wrong_is_named_with_its_reason() -> None:
    good = '{"prompt": "a", "completion": " b"}'
    checked = check_records("\n".join([good, '{"prompt": "x"}', "", "no", good]).encode())
    assert [it.line for it in checked.faults] == [2, 4]
    assert "missing or null: completion" in checked.faults[0].reason
    assert checked.faults[1].reason.startswith("malformed JSON")
    assert (checked.records, checked.faulty) == (2, 2)


def test_the_faults_of_a_wrong_file_are_bounded() -> None:
    checked = check_records(b"x\n" * 5000)
    assert checked.faulty == 5000
    assert len(checked.faults) == MOST_FAULTS


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_nothing_is_not_usable(content: bytes) -> None:
    assert not check_records(content).is_usable
