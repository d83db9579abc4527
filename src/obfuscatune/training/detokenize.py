"""Text of tokens as they come, with the white space at its seams."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 8
"""Last tokens of the prompt that are decoded too: enough for its last word, or a character of several tokens."""
_INCOMPLETE = "\ufffd"
"""What decoding gives for a character of which not all bytes are there yet."""


class Detokenizer:
    """Decodes what is written after a prompt, piece by piece.

    Tokenizers of the SentencePiece kind leave out the space before the first word that they decode. So the tokens
    before a piece are decoded with it, and their own text is cut off.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT_TOKENS:])
        self._context, self._shown = 0, len(self._ids)
        """Where the tokens begin that are decoded for their neighbours' sake, and those not shown yet."""

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens add; none while they end inside a character."""
        self._ids += ids
        text = self._unshown()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def rest(self) -> str:
        """What was held back, complete or not; to be called once, after the last token."""
        return self._unshown()

    def _unshown(self) -> str:
        before = self._decoded(self._ids[self._context : self._shown])
        return self._decoded(self._ids[self._context :])[len(before) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        decoded = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)
