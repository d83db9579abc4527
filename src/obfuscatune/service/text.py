"""Tokens -> the text of an answer, which ends before a stop string.

What may be the beginning of a stop string is held back until it is one, or is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from obfuscatune.training.detokenize import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Passes text on up to the first stop string. How the text was cut into pieces makes no difference."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.stopped = False
        """Whether a stop string came. Nothing is passed on afterwards."""

    def add(self, piece: str) -> str:
        """What may be shown now."""
        if self.stopped:
            return ""
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._strings if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]  # the one that is complete first; of two, the longer
        kept = max((_overlap(text, stop) for stop in self._strings), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that a stop string begins with, and that is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class AnswerText:
    """The text of an answer, as its tokens come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._stop.stopped

    def add(self, token: int) -> str:
        """The text that may be shown after one more token."""
        return self._stop.add(self._detokenizer.add([token]))

    def rest(self) -> str:
        """What was held back, after the last token."""
        return self._stop.add(self._detokenizer.rest()) + self._stop.rest()
