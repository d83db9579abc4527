"""While a model decodes beside a worker that watches a slot, each of both has its own cores.

Both wait awake then, for less than a millisecond at a time. An operation of torch that calls upon all cores would
wait for the one on which the worker is, longer than it takes on one core alone. The head, which is large and comes when
the worker has nothing more to do, is left to all cores: the worker is told to leave its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from obfuscatune.enclave.link import WorkerLink
from obfuscatune.enclave.profiles import Profile
from obfuscatune.machine import cores
from obfuscatune.wire.errors import ProtectionError
from obfuscatune.wire.limits import MAX_SLOT_ROWS


class CoreKeeper:
    """Leaves the worker a core during forward passes of few tokens."""

    def __init__(self, link: WorkerLink, profile: Profile) -> None:
        self.link = link
        self._cores = cores()
        self._most = 0 if profile.full_rank or not profile.mixing else MAX_SLOT_ROWS - profile.shield_rows

    def watch_over(self, model: nn.Module) -> None:
        """From now on, whenever that model, which holds the blocks and not the head, is called."""
        model.forward = _Watched(self, model.forward)

    def spare_threads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """How many threads a model is to be called with; None for as many as there are."""
        threads = torch.get_num_threads()
        fewer = max(min(threads, self._cores - 1), 1)
        shares = fewer < threads and 0 < _tokens(args, kwargs) <= self._most and self.link.is_watched
        return fewer if shares else None


class _Watched:
    """A model's `forward`, with a core left for the worker. No hooks: of an interrupt these do not hear."""

    def __init__(self, keeper: CoreKeeper, forward: Callable[..., Any]) -> None:
        self._keeper = keeper
        self.__wrapped__ = forward
        """Whose signature this has."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fewer = self._keeper.spare_threads(args, kwargs)
        if fewer is None:
            return self.__wrapped__(*args, **kwargs)
        threads = torch.get_num_threads()
        torch.set_num_threads(fewer)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)
            self._keeper.link.let_go()

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise ProtectionError("a protected model cannot be copied: it holds a connection to the worker")


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many tokens a model is called with; 0 where that cannot be told."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(ids, Tensor):
        return ids.numel()
    embeddings = kwargs.get("inputs_embeds")
    return embeddings.shape[:-1].numel() if isinstance(embeddings, Tensor) else 0
