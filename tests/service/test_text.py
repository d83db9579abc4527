"""Text ends before a stop string, however it comes in pieces; and requests are checked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import DataError
from obfuscatune.service.requests import Request
from obfuscatune.service.text import AnswerText, StopStrings
from tests.service.answers import tiny_tokenizer

WORD = st.text("ab", max_size=12)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first moment at which the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(pieces=st.lists(WORD), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_make_no_difference(pieces: list[str], stops: list[str]) -> None:
    strings, shown = StopStrings(stops), ""
    whole = "".join(pieces)
    kept, stopped = expected(whole, stops)
    for count, piece in enumerate(pieces, start=1):
        shown += strings.add(piece)
        assert kept.startswith(shown)  # nothing is shown that would have to be taken back
        if not stopped:  # and no more is held back than a beginning of a stop string
            held = len("".join(pieces[:count])) - len(shown)
            assert held < max(map(len, stops), default=1)
    shown += strings.rest()
    assert (shown, strings.stopped) == (kept, stopped)


@given(text=st.text(min_size=1, max_size=20), cut=st.integers(0, 20))
def test_tokens_give_their_text(text: str, cut: int) -> None:
    """Whatever characters there are: several tokens each, or several each token."""
    tokenizer = tiny_tokenizer_once()
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    answer = AnswerText(tokenizer, [40], ())
    assert "".join(answer.add(token) for token in ids) + answer.rest() == decoded
    stop = decoded[cut : cut + 2]
    if stop:
        answer = AnswerText(tokenizer, [40], (stop,))
        assert "".join(answer.add(token) for token in ids) + answer.rest() == decoded[: decoded.index(stop)]
        assert answer.stopped


_TOKENIZER: list[Any] = []


def tiny_tokenizer_once() -> Any:
    """That of the embedded model."""
    if not _TOKENIZER:
        _TOKENIZER.append(tiny_tokenizer())
    return _TOKENIZER[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": ()},
        {"max_tokens": -1},
        {"stop": ("",)},
        {"stop": ("x" * 1025,)},
        {"stop": tuple(map(str, range(17)))},
        {"stop_ids": tuple(range(65))},
        {"logprobs": 21},
        {"logprobs": -1},
        {"prompt_logprobs": True},
        {"timeout_s": 0.0},
        {"timeout_s": float("nan")},
    ],
    ids=str,
)
def test_requests_outside_the_limits_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"expected"):
        Request(**{"prompt": (1,), "max_tokens": 1, **settings})


def test_what_is_private_is_not_in_a_request_s_repr() -> None:
    shown = repr(Request((987654321,), 5, stop=("secret",)))
    assert "987654321" not in shown
    assert "secret" not in shown
