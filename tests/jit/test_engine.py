"""Code is compiled once, whichever threads ask for it first."""

from __future__ import annotations

import threading

import pytest

from obfuscatune.jit.engine import compiled_once


def test_threads_that_ask_together_get_what_was_compiled_once() -> None:
    begun, may_end = threading.Event(), threading.Event()
    compiled: list[int] = []

    @compiled_once
    def compile_for(itemsize: int) -> object:
        compiled.append(itemsize)
        begun.set()
        assert may_end.wait(60)
        return object()

    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(compile_for(4))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    may_end.set()
    for thread in threads:
        thread.join()
    assert compiled == [4]
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
    assert compile_for(8) is not found[0]


def test_what_failed_is_tried_again() -> None:
    turns: list[int] = []

    @compiled_once
    def compile_at_last() -> int:
        turns.append(1)
        if len(turns) == 1:
            raise RuntimeError("no")
        return 7

    with pytest.raises(RuntimeError):
        compile_at_last()
    assert compile_at_last() == compile_at_last() == 7
    assert len(turns) == 2
