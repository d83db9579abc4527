"""How many threads the kernels take."""

from __future__ import annotations

import threading

import torch

from obfuscatune.native import compute_on


def test_a_thread_that_computes_on_one_core_leaves_the_others_theirs() -> None:
    before, seen = torch.get_num_threads(), []

    def thread() -> None:
        compute_on(1)
        seen.append(torch.get_num_threads())

    torch.set_num_threads(2)
    try:
        aside = threading.Thread(target=thread)
        aside.start()
        aside.join()
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
