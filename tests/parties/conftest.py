"""One world for the tests of a file, which start it once."""

from collections.abc import Iterator

import pytest

from tests.parties.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"))
    with made.running():
        yield made
