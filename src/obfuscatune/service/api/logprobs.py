"""Log-probabilities in the two forms of OpenAI's API.

A token's text is what it stands for alone; a token inside a character has the bytes that are known of it.
"""

import math
from collections.abc import Sequence
from typing import Any

from obfuscatune.service.requests import TokenEvent
from obfuscatune.service.sampling import TokenLogprobs

_LEAST = -9999.0
"""OpenAI's, where a probability is 0 in floating point: JSON has no infinity."""


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token, alone."""
    return str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return logprob if math.isfinite(logprob) else _LEAST


def of_chat(tokenizer: Any, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""
    content = []
    for event in tokens:
        told = event.logprobs
        if told is None:
            continue
        top = [_entry(tokenizer, token, logprob) for token, logprob in told.top]
        content.append({**_entry(tokenizer, event.token, told.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Any, token: int, logprob: float | None) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    return {"token": text, "logprob": finite(logprob or 0.0), "bytes": list(text.encode("utf-8", "replace"))}


def of_text(
    tokenizer: Any,
    prompt: Sequence[int],
    before: Sequence[TokenLogprobs],
    tokens: Sequence[TokenEvent],
    offset: int,
) -> dict[str, Any]:
    """The `logprobs` of a completion's choice, or of one chunk of it.

    Args:
        prompt: token ids that are told too.
        before: theirs.
        offset: characters that were told before.
    """
    told = [*before[: len(prompt)], *(event.logprobs for event in tokens if event.logprobs is not None)]
    texts = [token_text(tokenizer, it.token) for it in told]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if it.logprob is None else finite(it.logprob) for it in told],
        "top_logprobs": [
            None if it.logprob is None else {token_text(tokenizer, token): finite(logprob) for token, logprob in it.top}
            for it in told
        ],
        "text_offset": offsets,
    }
