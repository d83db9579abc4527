"""Numbers as people read them."""

import socket

import pytest

from obfuscatune.report.page import environment, format_bytes, format_count, format_seconds, format_share, format_small


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1.00 kB"), (1000, "1.00 kB"), (12_582_912, "12.6 MB"), (4_915_200, "4.92 MB"),
     (999_600, "1.00 MB"), (5.9e9, "5.90 GB"), (123e12, "123 TB")],
)  # fmt: skip
def test_bytes(count, text):
    assert format_bytes(count) == text


def test_seconds():
    assert [format_seconds(value) for value in (0.04, 12.34, 99.96, 125.4)] == [
        "0.0 s",
        "12.3 s",
        "1 min 40 s",
        "2 min 05 s",
    ]


def test_the_rest():
    assert format_count(1557611200) == "1,557,611,200"
    assert format_share(0.05332) == "5.3 %"
    assert [format_small(value) for value in (0.0, 1.43e-6)] == ["0", "1.4e-06"]


def test_the_environment_names_versions_and_no_machine():
    found = environment()
    assert {"obfuscatune", "torch", "processor", "torch threads"} <= set(found)
    assert socket.gethostname() not in found.values()
