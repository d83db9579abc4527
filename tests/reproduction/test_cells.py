"""A cell is there whole or not at all, and is found again by its settings alone."""

import pytest

from obfuscatune.errors import StorageError
from obfuscatune.reproduction.cells import Cell, CellStore
from obfuscatune.reproduction.run import unwatched
from obfuscatune.training.storage import RunDirectory


@pytest.fixture
def store(tmp_path):
    return CellStore(RunDirectory(tmp_path))


def cell(result=None, **settings):
    return Cell("kind", "a b/c", settings, lambda watch: result or {"value": 1.5})


def test_what_was_measured_is_read_again(store):
    assert store.read(cell(a=1)) is None
    written = store.measure(cell(a=1), unwatched)
    assert store.read(cell(a=1)) == written
    assert (written.result, written.settings) == ({"value": 1.5}, {"a": 1})
    assert "torch" in written.environment


def test_other_settings_are_another_cell(store):
    store.measure(cell(a=1), unwatched)
    others = [cell(a=2), cell(a="1"), cell(a=1, b=1), Cell("other", "a b/c", {"a": 1}, dict)]
    assert store.missing([cell(a=1), *others]) == others


def test_the_order_of_settings_is_none_of_them():
    assert cell(a=1, b=2).key == cell(b=2, a=1).key


def test_a_cell_that_fails_leaves_nothing(store, tmp_path):
    def fail(watch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.measure(Cell("kind", "name", {}, fail), unwatched)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kind": "kind"}'])
def test_a_file_that_is_no_cell_is_named(store, tmp_path, content):
    path = tmp_path / "cells" / f"{cell(a=1).key}.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(StorageError, match=r"kind-a-b-c-.*\.json: not a finished cell; remove it"):
        store.read(cell(a=1))
